"""Output rows of a search: lists of the K behaviours, SimTier histograms, or both."""
# M candidates, K kept

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl

from prerank_tools.gsu.frames import Search
from prerank_tools.gsu.search import TopK
from prerank_tools.gsu.search_numba import count_tiers
from prerank_tools.tables.vectors import numpy_to_vectors

Emit = Literal["topk", "simtier", "both"]
LIST_COLUMNS, TIER_COLUMNS = ("behavior_ids", "positions", "sims"), ("simtier", "simtier_recent")


def gsu_frame(search: Search, found: TopK, has_vector_M: np.ndarray, emit: Emit) -> pl.DataFrame:
    """The output rows of a search, in the order of its requests."""
    back = np.argsort(search.order_M)
    columns = [
        pl.Series("has_vector", has_vector_M[back]),
        pl.Series("n_valid", found.n_valid_M[back].astype(np.uint32)),
    ]
    frame = search.asked.select("request_id", "item_id").with_columns(columns)
    if emit != "simtier":
        frame = frame.with_columns(_lists(search, found, back))
    if emit != "topk":
        frame = frame.with_columns(
            numpy_to_vectors("simtier", count_tiers(found.sims_MK[back])),
            numpy_to_vectors("simtier_recent", count_tiers(found.recent_MS[back])),
        )
    return frame


def _lists(search: Search, found: TopK, back: np.ndarray) -> list[pl.Series]:
    """Ids, positions and cosines as lists of what was found, without padding."""
    positions_MK = found.positions_MK[back]
    kept_M = (positions_MK >= 0).sum(1)
    named = {
        "behavior_ids": search.items.gather(search.behavior_items(found.positions_MK)[back].ravel()),
        "positions": pl.Series(np.maximum(positions_MK, 0).astype(np.uint32).ravel()),
        "sims": pl.Series(found.sims_MK[back].astype(np.float16).ravel()),
    }
    return [_as_lists(name, values, kept_M) for name, values in named.items()]


def _as_lists(name: str, values: pl.Series, lengths: np.ndarray) -> pl.Series:
    """The first so many of each run of K values; cutting equal runs is twenty times a group_by."""
    if not len(lengths):
        return pl.Series(name, [], dtype=pl.List(values.dtype))
    runs = values.reshape((len(lengths), -1)).arr.to_list()
    return pl.DataFrame({name: runs, "n": lengths}).select(pl.col(name).list.head("n")).to_series()
