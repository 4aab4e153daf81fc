"""`prerank inspect`: what an output is, where it comes from, whether its bytes are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import report_command


def register(app: typer.Typer) -> None:
    """Add the command to the program."""

    @report_command(
        app,
        "inspect",
        command="inspect",
        examples=("prerank inspect emb/", "prerank inspect emb/ --verify --json"),
    )
    def inspect(
        path: Annotated[Path, typer.Argument(help="An output folder, or a .parquet file of prerank.")],
        verify: Annotated[
            bool, typer.Option("--verify", help="Read every byte against its checksum.")
        ] = False,
        compare_to: Annotated[
            Path | None, typer.Option(help="Another output: what differs between the two.")
        ] = None,
    ) -> dict[str, Any]:
        """Show manifest, lineage and quality of anything that prerank wrote."""
        from prerank_tools.run.inspection import describe

        return describe(path, verify=verify, compare_to=compare_to)
