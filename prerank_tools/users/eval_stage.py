"""`eval users`: can the next basket be read off frozen user vectors? A linear probe, beside baselines."""

# S users with a row and a later basket, I items, D vector dims, E item dims

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prerank_tools.data.stage import basket_codes
from prerank_tools.errors import ContractError
from prerank_tools.metrics.bootstrap import mean_interval
from prerank_tools.tables.events import as_of, open_events
from prerank_tools.tables.table import Table, open_table
from prerank_tools.tables.vectors import vectors_to_numpy
from prerank_tools.users import probe
from prerank_tools.users.frames import check_ids, item_vectors


def evaluate_users(
    users: Path, events: Path, embeddings: Path, *, at: int | None = None, k: int = 10, ridge: float = 1.0
) -> dict[str, Any]:
    """HR@k of the first basket from `at` on, over all items with a vector, with 95 % intervals over users.

    `probe` reads the user vectors, `probe_of_mean_content` the mean vector of the history,
    `probe_of_nothing` a constant; `content` ranks by the cosine with that mean, `popularity` by counts
    before `at`.
    Raises ContractError where the vectors have seen events from `at` on.
    """
    table, log_table = open_table(users, "user_embeddings"), open_table(events, "events")
    items_table = open_table(embeddings, "item_embeddings")
    check_ids(log_table, items_table)
    at = _latest(table) if at is None else at
    _check_cutoff(table, at)
    log, vectors_IE = _coded(log_table, items_table)
    joined = _judged(table, log, at)
    if len(joined) < 2:
        raise ContractError(
            f"{events}: fewer than two users of {users} buy after {at}", "give an earlier --at"
        )
    bought = [np.unique(items) for items in joined["bought"].to_list()]
    mean_SE = np.stack([vectors_IE[np.array(seen)].mean(axis=0) for seen in joined["seen"].to_list()])
    counts_I = np.bincount(as_of(log, at)["item"].to_numpy(), minlength=len(vectors_IE))
    x_SD = vectors_to_numpy(joined["embedding"])
    return {
        "at": at,
        "users": len(bought),
        "items": len(vectors_IE),
        "mean_basket": float(np.mean([len(basket) for basket in bought])),
        "k": k,
        "hit_rate": {
            name: asdict(mean_interval(hit_S.astype(np.float64), np.arange(len(bought))))
            for name, hit_S in _hits(x_SD, mean_SE, counts_I, vectors_IE, bought, k, ridge).items()
        },
        "about": "ours: ridge regression from the frozen vector to the mean item vector of the next basket, "
        "fitted on four fifths of the users and judged on the rest, five times",
    }


def _latest(users: Table) -> int:
    return int(users.scan(["as_of"]).select(pl.col("as_of").max()).collect().item())


def _check_cutoff(users: Table, at: int) -> None:
    if users.data_cutoff is not None and users.data_cutoff >= at:
        raise ContractError(
            f"{users.path}: has seen events until {users.data_cutoff}, the baskets to predict begin at {at}",
            "give a later --at, or embed with an earlier --as-of and a model trained --until then",
        )


def _coded(events: Table, embeddings: Table) -> tuple[pl.DataFrame, np.ndarray]:
    """Events on items with a vector, `item` being the row of (I, E) vectors, in the order of ids."""
    columns = [name for name in ("basket_id", "session_id", "ingested_at") if name in events.schema]
    log = open_events(events)
    frame = pl.concat([log.read(bucket, columns) for bucket in range(log.buckets)])
    items = embeddings.read(["item_id"])["item_id"].sort()
    code = pl.DataFrame({"item_id": items, "item": np.arange(len(items))})
    frame = frame.join(code, on="item_id", how="inner", maintain_order="left")
    return frame, item_vectors(embeddings, items, {})


def _judged(users: Table, log: pl.DataFrame, at: int) -> pl.DataFrame:
    """Users with a vector by `at` and a basket from then on: embedding, `bought` and, of the past, `seen`."""
    rows = users.read(["user_id", "as_of", "embedding"]).filter(pl.col("as_of") <= at)
    rows = rows.sort("user_id", "as_of").unique("user_id", keep="last", maintain_order=True)
    past = as_of(log, at).group_by("user_id", maintain_order=True).agg(seen=pl.col("item"))
    joined = rows.join(_first_baskets(log, at), on="user_id", maintain_order="left")
    return joined.join(past, on="user_id", maintain_order="left")


def _hits(
    x_SD: np.ndarray,
    mean_SE: np.ndarray,
    counts_I: np.ndarray,
    vectors_IE: np.ndarray,
    bought: Sequence[np.ndarray],
    k: int,
    ridge: float,
) -> dict[str, np.ndarray]:
    """Hits of the probe and of its baselines, one a user."""

    def probed(input_SX: np.ndarray) -> np.ndarray:
        return probe.crossfit_hits(input_SX, vectors_IE, bought, k=k, ridge=ridge)

    centre_E = vectors_IE.mean(axis=0)
    cosine_SI = (mean_SE - centre_E) @ probe.unit(vectors_IE - centre_E).T
    popular_SI = np.broadcast_to(counts_I.astype(np.float64), cosine_SI.shape)
    return {
        "probe": probed(x_SD),
        "probe_of_mean_content": probed(mean_SE),
        "probe_of_nothing": probed(np.zeros((len(x_SD), 1))),
        "content": probe.hits(cosine_SI, bought, k=k),
        "popularity": probe.hits(popular_SI, bought, k=k),
    }


def _first_baskets(log: pl.DataFrame, at: int) -> pl.DataFrame:
    """user_id and `bought`: the items of each user's first basket that begins at `at` or later."""
    basket = pl.Series("basket", basket_codes(log))
    coded = log.with_columns(basket).with_columns(begin=pl.col("timestamp").min().over("basket"))
    later = coded.filter(pl.col("begin") >= at).sort("user_id", "begin", "basket")
    first = later.filter(pl.col("basket") == pl.col("basket").first().over("user_id"))
    return first.group_by("user_id", maintain_order=True).agg(bought=pl.col("item"))
