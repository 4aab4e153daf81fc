"""`prerank eval`: Measure embeddings, semantic IDs, GSU, users and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import report_command

app = typer.Typer(
    name="eval", help="Measure embeddings, semantic IDs, GSU, users and scores.", no_args_is_help=True
)


@report_command(
    app,
    "scores",
    examples=(
        "prerank eval scores scores.parquet --requests r.parquet --events e.parquet",
        "prerank eval scores scores.parquet --requests r.parquet --json",
    ),
)
def scores(
    scores: Annotated[Path, typer.Argument(help="Scores, from `prerank score`.")],
    requests: Annotated[Path, typer.Option(help="The requests that were scored, with labels.")],
    events: Annotated[
        Path | None, typer.Option(help="Behaviour log: adds popularity before each request.")
    ] = None,
    k: Annotated[list[int] | None, typer.Option(help="Depths of recall and NDCG; 10 and 50.")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Draws of users for the intervals.")] = 200,
) -> dict[str, Any]:
    """Measure AUC, GAUC, UAUC, NE, recall@k and NDCG@k of scores, beside popularity and chance."""
    from prerank_tools.scorers.eval_stage import evaluate_scores

    return evaluate_scores(scores, requests, events=events, ks=k or (10, 50), resamples=resamples)
