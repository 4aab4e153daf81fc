"""`prerank export`: Write vectors, semantic IDs and models for others."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import stage_command

app = typer.Typer(
    name="export", help="Write vectors, semantic IDs and models for others.", no_args_is_help=True
)


class RowFormat(StrEnum):
    """How a row is packed."""

    int8 = "int8"
    fp8 = "fp8"
    uint4 = "uint4"


@stage_command(
    app,
    "vectors",
    examples=(
        "prerank export vectors emb/ --format int8 -o emb_int8/",
        "prerank export vectors uemb/ --format fp8 -o uemb_fp8/",
    ),
)
def vectors(
    table: Annotated[Path, typer.Argument(help="Item or user embeddings.")],
    format: Annotated[
        RowFormat, typer.Option(help="int8 and fp8 take a byte a value, uint4 half a byte.")
    ] = RowFormat.int8,
) -> Any:
    """Pack vectors into low-precision rows with a scale each; what is lost is measured."""
    from prerank_tools.precision.stage import ExportVectors

    return ExportVectors(table, format=format.value)  # type: ignore[arg-type]


class SidFormat(StrEnum):
    """Whose files to write."""

    lcrec = "lcrec"
    grid = "grid"
    tzrec = "tzrec"
    openonerec = "openonerec"
    tokens = "tokens"
    lookup = "lookup"


@stage_command(
    app,
    "sid",
    examples=(
        "prerank export sid sid/ --format lcrec -o sid_lcrec/",
        "prerank export sid sid/ --format lookup -o sid_lookup/",
    ),
)
def sid(
    sids: Annotated[Path, typer.Argument(help="Item SIDs, from `prerank quantize sid`.")],
    format: Annotated[
        SidFormat,
        typer.Option(
            help="LC-Rec and MiniOneRec index.json; GRID tensor; TorchEasyRec or OpenOneRec Parquet; "
            "LLM tokens; SID -> items."
        ),
    ] = SidFormat.lcrec,
) -> Any:
    """Write SIDs in the format of another project; a README in the output names its files."""
    from prerank_tools.export.sid import ExportSid

    return ExportSid(sids, format=format.value)
