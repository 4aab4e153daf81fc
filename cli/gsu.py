"""`prerank gsu`: Search each user's past for what resembles a candidate."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import IO, parse_knobs, stage_command

app = typer.Typer(
    name="gsu", help="Search each user's past for what resembles a candidate.", no_args_is_help=True
)
SEARCH = "Search"


class Mode(StrEnum):
    """What the K behaviours are chosen by."""

    cosine = "cosine"
    soft = "sim-soft"
    hard = "sim-hard"
    prefix = "sid-prefix"


class Emit(StrEnum):
    """What is stored of them."""

    topk = "topk"
    simtier = "simtier"
    both = "both"


class TwoStep(StrEnum):
    """Which index lists the behaviours of very long histories."""

    ivf = "ivf"
    hnsw = "hnsw"
    items = "items"


class Missing(StrEnum):
    """What a cold user or a candidate without a vector is."""

    zero = "zero"
    fail = "fail"


@stage_command(
    app,
    "topk",
    examples=(
        "prerank gsu topk --requests r.parquet --events e.parquet --embeddings emb/ -o gsu/",
        "prerank gsu topk --requests r.parquet --events e.parquet --embeddings emb/ --emit simtier -o tiers/",
    ),
)
def topk(
    requests: Annotated[Path, typer.Option(help="Who asks when about which candidates.", rich_help_panel=IO)],
    events: Annotated[Path, typer.Option(help="The behaviour log.", rich_help_panel=IO)],
    embeddings: Annotated[Path, typer.Option(help="Item vectors to take cosines of.", rich_help_panel=IO)],
    mode: Annotated[Mode, typer.Option(help="What to choose by.", rich_help_panel=SEARCH)] = Mode.cosine,
    emit: Annotated[
        Emit, typer.Option(help="Lists of K are about 20 times the histograms.", rich_help_panel=SEARCH)
    ] = Emit.both,
    id_embeddings: Annotated[
        Path | None, typer.Option(help="ID vectors, for sim-soft.", rich_help_panel=SEARCH)
    ] = None,
    items: Annotated[
        Path | None, typer.Option(help="Items with a category, for sim-hard.", rich_help_panel=SEARCH)
    ] = None,
    category_column: Annotated[
        str, typer.Option(help="Column of --items.", rich_help_panel=SEARCH)
    ] = "category",
    sids: Annotated[
        Path | None, typer.Option(help="Semantic IDs, for sid-prefix.", rich_help_panel=SEARCH)
    ] = None,
    missing: Annotated[
        Missing,
        typer.Option(
            help="Cold users and items without a vector: zeros, or an error.", rich_help_panel=SEARCH
        ),
    ] = Missing.zero,
    two_step: Annotated[
        TwoStep | None,
        typer.Option(help="Search very long histories through an index.", rich_help_panel=SEARCH),
    ] = None,
    min_recall: Annotated[
        float, typer.Option(min=0, max=1, help="Of --two-step, on a sample.", rich_help_panel=SEARCH)
    ] = 0.95,
    knobs: dict[str, Any] | None = None,
) -> Any:
    """Find the K past behaviours nearest to each candidate, as lists and SimTier histograms.

    A request sees only what came strictly before its own time. Keys of the config: k, recent,
    lag (seconds), and a section `index` for --two-step.
    """
    from prerank_tools.gsu.stage import GsuConfig, GsuTopK

    return GsuTopK(
        requests=requests,
        events=events,
        embeddings=embeddings,
        mode=mode.value,  # type: ignore[arg-type]
        emit=emit.value,  # type: ignore[arg-type]
        id_embeddings=id_embeddings,
        items=items,
        category=category_column,
        sids=sids,
        missing=missing.value,  # type: ignore[arg-type]
        two_step=two_step.value if two_step else None,
        min_recall=min_recall,
        config=parse_knobs(GsuConfig, knobs or {}),
    )
