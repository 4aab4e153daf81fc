"""`prerank eval`: Measure embeddings, semantic IDs, GSU, users and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import report_command
from .times import time_option

app = typer.Typer(
    name="eval", help="Measure embeddings, semantic IDs, GSU, users and scores.", no_args_is_help=True
)


@report_command(
    app,
    "embeddings",
    examples=(
        "prerank eval embeddings emb/ --events events.parquet --from 2011-10-11",
        "prerank eval embeddings emb/ --items items.parquet --category category --json",
    ),
)
def embeddings(
    embeddings: Annotated[Path, typer.Argument(help="Item embeddings, from `prerank embed items`.")],
    events: Annotated[
        Path | None, typer.Option(help="Behaviour log: are items of one basket near each other?")
    ] = None,
    start: Annotated[int | None, time_option("--from", help="Only baskets from this time on.")] = None,
    items: Annotated[Path | None, typer.Option(help="Item catalogue, for --category.")] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="Column of --items: are its values together? May be repeated.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Neighbours an item.")] = 10,
) -> dict[str, Any]:
    """Measure recall@k of co-purchases and purity@k of categories, beside popularity and chance."""
    from prerank_tools.encoders.eval_stage import evaluate_embeddings

    return evaluate_embeddings(
        embeddings, events=events, start=start, items=items, categories=category or (), k=k
    )


@report_command(
    app,
    "gsu",
    examples=(
        "prerank eval gsu gsu/ --requests r.parquet",
        "prerank eval gsu gsu/ --against gsu/ --json",
    ),
)
def gsu(
    gsu: Annotated[Path, typer.Argument(help="Top-K rows, from `prerank gsu topk`.")],
    requests: Annotated[
        Path | None, typer.Option(help="The requests that were searched: adds AUC and GAUC of their labels.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="An exact search of the same requests: adds recall.")
    ] = None,
) -> dict[str, Any]:
    """Measure what the retrieved cosines tell of the labels, and recall against an exact search."""
    from prerank_tools.gsu.eval_stage import evaluate_gsu

    return evaluate_gsu(gsu, requests=requests, against=against)


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


@report_command(
    app,
    "sid",
    examples=(
        "prerank eval sid sid/ --embeddings emb/",
        "prerank eval sid sid_next/ --embeddings emb/ --events events.parquet --against sid/ --json",
    ),
)
def sid(
    sids: Annotated[Path, typer.Argument(help="Item SIDs, or an export of them in any format.")],
    embeddings: Annotated[
        Path | None, typer.Option(help="The vectors: adds reconstruction, neighbours, duplicates.")
    ] = None,
    codebook: Annotated[
        Path | None, typer.Option(help="What decodes the SIDs; found beside them where they hold it.")
    ] = None,
    fitted_on: Annotated[
        Path | None, typer.Option(help="Embeddings of the fit: the other items are measured apart.")
    ] = None,
    items: Annotated[Path | None, typer.Option(help="Item catalogue, for --category.")] = None,
    category: Annotated[
        list[str] | None,
        typer.Option(help="Column of --items: purity and NMI of SID prefixes. May be repeated."),
    ] = None,
    events: Annotated[
        Path | None, typer.Option(help="Behaviour log: do items of one basket share a prefix?")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Other SIDs of these items: an A/B.")] = None,
    queries: Annotated[int, typer.Option(min=1, help="Items sampled for neighbour recall.")] = 10_000,
) -> dict[str, Any]:
    """Judge SIDs: collisions, use of codes, reconstruction, neighbours, meaning, a verdict in words."""
    from prerank_tools.quantizers.eval_stage import EvalInputs, evaluate_sids

    inputs = EvalInputs(
        embeddings,
        codebook=codebook,
        fitted_on=fitted_on,
        items=items,
        categories=category or (),
        events=events,
        queries=queries,
    )
    return evaluate_sids(sids, inputs, against=against)


@report_command(
    app,
    "users",
    examples=(
        "prerank eval users uemb/ --events events.parquet --embeddings emb/",
        "prerank eval users uemb/ --events events.parquet --embeddings emb/ --at 2011-10-11 --json",
    ),
)
def users(
    users: Annotated[Path, typer.Argument(help="User embeddings, from `prerank embed users`.")],
    events: Annotated[Path, typer.Option(help="Behaviour log that goes on after the embeddings.")],
    embeddings: Annotated[Path, typer.Option(help="Item vectors: what the probe predicts.")],
    at: Annotated[
        int | None,
        time_option("--at", help="Predict the first basket from here; the last as-of time."),
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Depth of the hit rate.")] = 10,
    ridge: Annotated[float, typer.Option(min=0, help="Penalty of the probe, a sample.")] = 1.0,
) -> dict[str, Any]:
    """Measure HR@k of the next basket through a linear probe (ours), beside content and popularity."""
    from prerank_tools.users.eval_stage import evaluate_users

    return evaluate_users(users, events, embeddings, at=at, k=k, ridge=ridge)
