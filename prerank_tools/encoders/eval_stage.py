"""`eval embeddings`: do items near each other in the space belong together, in baskets and in categories?"""

# Q queries, N items, D dims, K neighbours
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prerank_tools.data.stage import basket_codes
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.metrics.bootstrap import mean_interval
from prerank_tools.quantizers.neighbours import nearest_rows, sample_rows
from prerank_tools.tables.table import Table, open_table, read_shard, shards_of
from prerank_tools.tables.vectors import vectors_to_numpy

# A basket of hundreds is a warehouse order: its pairs say little, and there are tens of thousands of them.
LARGEST_BASKET = 100


def evaluate_embeddings(
    embeddings: Path,
    *,
    events: Path | None = None,
    start: int | None = None,
    items: Path | None = None,
    categories: Sequence[str] = (),
    k: int = 10,
    queries: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Rows and norms; with `events` the recall@k of co-purchases, with `categories` their purity@k.

    Recall@k: of the items that share a basket with an item (from `start` on), the share among its k nearest
    by cosine, beside the k most popular items and beside chance. Purity@k: the share of the k nearest in the
    same category, beside chance. Means over `queries` sampled items with 95 % intervals (definitions ours).
    """
    table = open_table(embeddings, "item_embeddings")
    if table.rows <= k:
        raise UsageError(f"{embeddings}: {table.rows} items have no {k} neighbours", "ask for a smaller --k")
    ids = table.scan(["item_id"]).collect()["item_id"]
    norms_N = np.concatenate([np.linalg.norm(block, axis=1) for block in _blocks(table)])
    found: dict[str, Any] = {
        "items": len(ids),
        "dims": int(next(_blocks(table)).shape[1]),
        "mean_norm": float(norms_N.mean()),
    }
    if events is not None:
        pairs, popular = _copurchases(open_table(events, "events"), ids, start)
        found["co_purchase"] = _recall(table, pairs, popular, k=k, queries=queries, seed=seed)
    if categories:
        if items is None:
            raise UsageError("--category needs --items", "name the item table that holds the column")
        catalogue = open_table(items, "items")
        missing = [name for name in categories if name not in catalogue.schema]
        if missing:
            raise ContractError(f"{items}: no column `{missing[0]}`", f"it has {', '.join(catalogue.schema)}")
        named = ids.to_frame().join(catalogue.read(["item_id", *categories]), on="item_id", how="left")
        found["category"] = {
            name: _purity(table, named[name], k=k, queries=queries, seed=seed) for name in categories
        }
    return found


def _blocks(table: Table) -> Iterator[np.ndarray]:
    for shard in shards_of(table):
        yield vectors_to_numpy(read_shard(shard, ["embedding"])["embedding"]).astype(np.float32, copy=False)


def _unit_blocks(table: Table) -> Iterator[np.ndarray]:
    """Blocks of unit vectors, so that the nearest by distance is the nearest by cosine."""
    for block in _blocks(table):
        yield block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)


def _near(table: Table, rows_Q: np.ndarray, k: int) -> np.ndarray:
    """Row numbers (Q, k) of each query's nearest items, itself left out."""
    start, taken = 0, []
    for block in _unit_blocks(table):
        inside = rows_Q[(rows_Q >= start) & (rows_Q < start + len(block))]
        taken.append(block[inside - start])
        start += len(block)
    return nearest_rows(np.concatenate(taken), _unit_blocks(table), k=k, skip_Q=rows_Q)[1]


def _copurchases(table: Table, ids: pl.Series, start: int | None) -> tuple[pl.DataFrame, np.ndarray]:
    """Pairs (row, partner) of distinct items that share a basket from `start` on, and items by popularity."""
    wanted = [name for name in ("basket_id", "session_id") if name in table.schema]
    log = table.scan(["user_id", "item_id", "timestamp", *wanted]).drop_nulls(["item_id"]).collect()
    rows = ids.to_frame().with_row_index("row")
    before = log if start is None else log.filter(pl.col("timestamp") < start)
    counts = before.group_by("item_id").len()
    popular = rows.join(counts, on="item_id", how="left").sort(
        "len", "row", descending=[True, False], nulls_last=True
    )
    later = log if start is None else log.filter(pl.col("timestamp") >= start)
    later = later.with_columns(pl.Series("basket", basket_codes(later))).unique(["basket", "item_id"])
    later = later.join(rows, on="item_id").filter(pl.len().over("basket").is_between(2, LARGEST_BASKET))
    held = later.select("basket", "row")
    pairs = held.join(held.rename({"row": "partner"}), on="basket").filter(pl.col("row") != pl.col("partner"))
    return pairs.select("row", "partner").unique().sort("row", "partner"), popular["row"].to_numpy()


def _recall(
    table: Table, pairs: pl.DataFrame, popular: np.ndarray, *, k: int, queries: int, seed: int
) -> dict[str, Any]:
    if not len(pairs):
        return {"queries": 0}
    partners = pairs.group_by("row", maintain_order=True).agg("partner")
    chosen = np.sort(sample_rows(len(partners), min(queries, len(partners)), seed=seed))
    rows_Q = partners["row"].to_numpy()[chosen].astype(np.int64)
    wanted = partners["partner"][chosen.tolist()].to_list()
    near_QK = _near(table, rows_Q, k)
    by_vector, by_popularity = [], []
    for row, near_K, want in zip(rows_Q, near_QK, wanted, strict=True):
        others = popular[: k + 1][popular[: k + 1] != row][:k]
        by_vector.append(len(np.intersect1d(near_K, want)) / len(want))
        by_popularity.append(len(np.intersect1d(others, want)) / len(want))
    return {
        "queries": len(rows_Q),
        f"recall@{k}": _interval(np.array(by_vector), seed),
        f"popularity_recall@{k}": float(np.mean(by_popularity)),
        f"chance_recall@{k}": k / (table.rows - 1),
    }


def _purity(table: Table, category: pl.Series, *, k: int, queries: int, seed: int) -> dict[str, Any]:
    code_N = category.cast(pl.String).rank("dense").fill_null(0).to_numpy().astype(np.int64)
    known = np.flatnonzero(code_N)
    rows_Q = np.sort(known[sample_rows(len(known), min(queries, len(known)), seed=seed)])
    near_QK = _near(table, rows_Q, k)
    same_Q = (code_N[near_QK] == code_N[rows_Q, None]).mean(1)
    share = np.bincount(code_N[known]) / max(len(known), 1)
    return {
        "queries": len(rows_Q),
        f"purity@{k}": _interval(same_Q, seed),
        "chance": float((share**2).sum()),
    }


def _interval(values_Q: np.ndarray, seed: int) -> dict[str, float]:
    return asdict(mean_interval(values_Q, np.arange(len(values_Q)), seed=seed))
