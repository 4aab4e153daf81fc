"""Output rows of a search: lists of the K behaviours, SimTier histograms, or both."""
# M candidates, K kept

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl

from prerank_tools.gsu.frames import Search
from prerank_tools.gsu.search import TopK
from prerank_tools.gsu.simtier import simtier
from prerank_tools.tables.vectors import numpy_to_vectors

Emit = Literal["topk", "simtier", "both"]


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
            numpy_to_vectors("simtier", simtier(found.sims_MK)[back]),
            numpy_to_vectors("simtier_recent", simtier(found.recent_MS)[back]),
        )
    return frame


def _lists(search: Search, found: TopK, back: np.ndarray) -> list[pl.Series]:
    """Ids, positions and cosines as lists of what was found, without padding."""
    kept = found.positions_MK[back] >= 0
    offsets = pl.Series(kept.sum(1))
    ids = search.items.gather(search.behavior_items(found.positions_MK)[back][kept])
    positions = pl.Series(found.positions_MK[back][kept].astype(np.uint32))
    sims = pl.Series(found.sims_MK[back][kept].astype(np.float16))
    named = {"behavior_ids": ids, "positions": positions, "sims": sims}
    return [_as_lists(name, values, offsets) for name, values in named.items()]


def _as_lists(name: str, values: pl.Series, lengths: pl.Series) -> pl.Series:
    rows = np.repeat(np.arange(len(lengths)), lengths.to_numpy())
    lists = pl.DataFrame({"row": rows, name: values}).group_by("row", maintain_order=True).agg(name)
    every = pl.DataFrame({"row": np.arange(len(lengths))}).join(
        lists, on="row", how="left", maintain_order="left"
    )
    return every[name].fill_null(pl.Series([[]], dtype=every[name].dtype))
