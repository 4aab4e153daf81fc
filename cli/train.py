"""`prerank train`: Train an encoder, a quantizer, a user model or a scorer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import IO, parse_knobs, stage_command
from .score import Embeddings, Events, Features, Gsu, Items, Requests, Sids, Users
from .times import Until

app = typer.Typer(
    name="train", help="Train an encoder, a quantizer, a user model or a scorer.", no_args_is_help=True
)


@stage_command(
    app,
    "scorer",
    examples=(
        "prerank train scorer --requests r.parquet --events e.parquet --items items.parquet "
        "--embeddings emb/ -o scorer/",
        "prerank train scorer --requests r.parquet --events e.parquet --items items.parquet "
        "--embeddings emb/ --users uemb/ --until 2011-10-11 -o scorer_users/",
    ),
)
def scorer(
    requests: Requests,
    events: Events,
    items: Items,
    embeddings: Embeddings,
    users: Users = None,
    sids: Sids = None,
    gsu: Gsu = None,
    features: Features = None,
    until: Until = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Yesterday's scorer, to go on from.", rich_help_panel=IO)
    ] = None,
    knobs: dict[str, Any] | None = None,
) -> Any:
    """Train the three-tower scorer on labelled requests: user, item and cross tower, one head a label."""
    from prerank_tools.scorers.input_frames import InputPaths
    from prerank_tools.scorers.train_stage import TrainScorer, TrainScorerConfig

    paths = InputPaths(
        requests, events, items, embeddings, users=users, sids=sids, gsu=gsu, features=features
    )
    config = parse_knobs(TrainScorerConfig, knobs or {})
    return TrainScorer(paths, until=until, init_from=init_from, config=config)
