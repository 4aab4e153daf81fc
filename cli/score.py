"""`prerank score`: Score the candidates of requests."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import IO, stage_command

Requests = Annotated[Path, typer.Option(help="Requests with candidates: lists, or one row a candidate.")]
Events = Annotated[Path, typer.Option(help="Behaviour log; each request sees what came before it.")]
Items = Annotated[Path, typer.Option(help="Item catalogue.")]
Embeddings = Annotated[Path, typer.Option(help="Item embeddings, from `embed items`.")]
Users = Annotated[Path | None, typer.Option(help="User embeddings, from `embed users`.")]
Sids = Annotated[Path | None, typer.Option(help="Semantic IDs, from `quantize sid`.")]
Gsu = Annotated[
    Path | None, typer.Option(help="SimTier histograms, from `gsu topk`; searched here where not given.")
]
Features = Annotated[
    Path | None, typer.Option(help="Statistics, from `data features`; counted here where not given.")
]


class Missing(StrEnum):
    """What a candidate without a vector is."""

    zero = "zero"
    fail = "fail"


def register(app: typer.Typer) -> None:
    """Add the command to the top level."""
    stage_command(
        app,
        "score",
        command="score",
        examples=(
            "prerank score --requests r.parquet --model scorer/ --items items.parquet --embeddings emb/ "
            "--users uemb/ --events e.parquet -o scores.parquet",
            "prerank score --requests r.parquet --model scorer/ --items items.parquet --embeddings emb/ "
            "--users uemb/ --events e.parquet --top 10 -o top/",
        ),
    )(score)


def score(
    requests: Requests,
    model: Annotated[Path, typer.Option(help="Scorer, from `train scorer`.", rich_help_panel=IO)],
    items: Items,
    embeddings: Embeddings,
    events: Events,
    users: Users = None,
    sids: Sids = None,
    gsu: Gsu = None,
    features: Features = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Keep the best of each request; all where not given.")
    ] = None,
    missing: Annotated[
        Missing, typer.Option(help="A candidate without a vector is scored on zeros, or an error.")
    ] = Missing.zero,
) -> Any:
    """Score every candidate of every request and rank them; searches the past and counts as it goes."""
    from prerank_tools.scorers.input_frames import InputPaths
    from prerank_tools.scorers.score_stage import Score

    paths = InputPaths(
        requests, events, items, embeddings, users=users, sids=sids, gsu=gsu, features=features
    )
    return Score(paths, model=model, top=top, missing=missing.value)
