"""Output rows of a search: lists of the K behaviours, SimTier histograms, or both."""
# M candidates in search order, R the same in the order asked, K kept

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from prerank_tools.compiled import kernel
from prerank_tools.gsu.frames import Search
from prerank_tools.gsu.search import Groups, TopK
from prerank_tools.gsu.search_numba import count_tiers
from prerank_tools.tables.vectors import numpy_to_vectors

Emit = Literal["topk", "simtier", "both"]
LIST_COLUMNS, TIER_COLUMNS = ("behavior_ids", "positions", "sims"), ("simtier", "simtier_recent")


def gsu_frame(
    search: Search, found: TopK, has_vector_M: np.ndarray, emit: Emit, *, threads: int = 1
) -> pl.DataFrame:
    """The output rows of a search, in the order of its requests."""
    back = np.argsort(search.order_M)
    columns: dict[str, Callable[[], Any]] = {
        "has_vector": lambda: has_vector_M[back],
        "n_valid": lambda: found.n_valid_M[back].astype(np.uint32),
    }
    with ThreadPoolExecutor(threads) as pool:
        if emit != "simtier":
            columns |= _lists(search, found, pool, threads)
        if emit != "topk":
            columns |= {
                "simtier": lambda: numpy_to_vectors("simtier", count_tiers(found.sims_MK)[back]),
                "simtier_recent": lambda: numpy_to_vectors(
                    "simtier_recent", count_tiers(found.recent_MS)[back]
                ),
            }
        made = pool.map(lambda make: make(), columns.values())
        frame = search.asked.select("request_id", "item_id")
        return frame.with_columns(pl.Series(name, values) for name, values in zip(columns, made, strict=True))


def _lists(search: Search, found: TopK, pool: Executor, threads: int) -> dict[str, Callable[[], pl.Series]]:
    """Ids, positions and cosines as lists of what was found, without padding."""
    shape = found.positions_MK.shape
    place_RK, position_RK = np.zeros(shape, dtype=np.uint32), np.zeros(shape, dtype=np.uint32)
    sim_RK, kept_R = np.zeros(shape, dtype=np.float32), np.empty(shape[0], dtype=np.int64)
    cuts = np.linspace(0, len(search.groups.history_offsets) - 1, threads + 1).astype(int)
    arrays = (found, search.groups, search.order_M, place_RK, position_RK, sim_RK, kept_R)
    list(pool.map(lambda first, last: _in_asked_order(first, last, *arrays), cuts[:-1], cuts[1:]))
    values = {
        "behavior_ids": lambda: search.items.gather(place_RK.ravel()),
        "positions": lambda: pl.Series(position_RK.ravel()),
        # numpy's bytes, in a tenth of its time
        "sims": lambda: pl.Series(torch.from_numpy(sim_RK).half().numpy().ravel()),
    }
    return {name: partial(_as_lists, name, of, kept_R) for name, of in values.items()}


@kernel
def _in_asked_order(
    first_group: int,
    last_group: int,
    found: TopK,
    groups: Groups,
    order_M: np.ndarray,
    place_RK: np.ndarray,
    position_RK: np.ndarray,
    sim_RK: np.ndarray,
    kept_R: np.ndarray,
) -> None:
    """Found behaviours in the order of the rows asked: their items' places, positions, cosines and number."""
    for group in range(first_group, last_group):
        rows_n = groups.history_rows_N[groups.history_offsets[group] : groups.history_offsets[group + 1]]
        for m in range(groups.candidate_offsets[group], groups.candidate_offsets[group + 1]):
            r, kept = order_M[m], 0
            while kept < found.positions_MK.shape[1] and found.positions_MK[m, kept] >= 0:
                position = found.positions_MK[m, kept]
                place_RK[r, kept] = rows_n[position]
                position_RK[r, kept] = position
                sim_RK[r, kept] = found.sims_MK[m, kept]
                kept += 1
            kept_R[r] = kept


def _as_lists(name: str, of: Callable[[], pl.Series], lengths: np.ndarray) -> pl.Series:
    """The first so many of each run of K values; cutting equal runs is twenty times a group_by."""
    values = of()
    if not len(lengths):
        return pl.Series(name, [], dtype=pl.List(values.dtype))
    runs = values.reshape((len(lengths), -1)).arr.to_list()
    return pl.DataFrame({name: runs, "n": lengths}).select(pl.col(name).list.head("n")).to_series()
