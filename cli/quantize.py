"""`prerank quantize`: Turn item embeddings into semantic IDs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import IO, parse_knobs, stage_command
from .times import Until

app = typer.Typer(name="quantize", help="Turn item embeddings into semantic IDs.", no_args_is_help=True)
LIFE = "Codebook and published SIDs"


class Collisions(StrEnum):
    """What becomes of items that share all codes."""

    keep = "keep"
    suffix = "suffix"
    capacity = "capacity"
    sinkhorn = "sinkhorn"
    optimal = "optimal"


@stage_command(
    app,
    "sid",
    examples=(
        "prerank quantize sid emb/ -o sid/",
        "prerank quantize sid emb/ --codebook sid/codebook --previous sid/ -o sid_next/",
    ),
)
def sid(
    embeddings: Annotated[Path, typer.Argument(help="Item embeddings, one vector an item.")],
    codebook: Annotated[
        Path | None,
        typer.Option(help="Assign with this codebook; without it one is fitted.", rich_help_panel=LIFE),
    ] = None,
    previous: Annotated[
        Path | None,
        typer.Option(
            help="SIDs published before: kept under the same codebook, else churn is reported.",
            rich_help_panel=LIFE,
        ),
    ] = None,
    reassign_changed: Annotated[
        bool,
        typer.Option("--reassign-changed", help="Edited items get new SIDs.", rich_help_panel=LIFE),
    ] = False,
    match: Annotated[
        Path | None,
        typer.Option(help="Number the codes of a new fit after this codebook's.", rich_help_panel=LIFE),
    ] = None,
    collisions: Annotated[
        Collisions, typer.Option(help="What becomes of items with equal codes.", rich_help_panel=LIFE)
    ] = Collisions.keep,
    events: Annotated[
        Path | None,
        typer.Option(help="With --until: fit on items with an event before it.", rich_help_panel=IO),
    ] = None,
    until: Until = None,
    *,
    knobs: dict[str, Any],
) -> Any:
    """Assign a semantic ID to every item; without --codebook, fit one and store it with the output."""
    from prerank_tools.quantizers.fit_stage import SidConfig
    from prerank_tools.quantizers.stage import QuantizeSids

    return QuantizeSids(
        embeddings,
        codebook=codebook,
        previous=previous,
        match=match,
        events=events,
        until=until,
        collisions=collisions.value,
        reassign_changed=reassign_changed,
        config=parse_knobs(SidConfig, knobs),
    )
