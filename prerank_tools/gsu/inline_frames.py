"""GSU inside another stage: SimTier histograms of requests, nothing stored."""
# R rows asked (request, candidate), D dims

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from prerank_tools.gsu.frames import flat_requests, search_of
from prerank_tools.gsu.search import RECENT, Backend, topk
from prerank_tools.gsu.search_numba import count_tiers
from prerank_tools.gsu.vector_frames import ItemVectors


@dataclass(frozen=True)
class SimTiers:
    """Raw counts, row for row with `asked` (request_id, user_id, timestamp, item_id; by request and item).

    `simtier_RN` and `recent_RN` are uint8 (R, 22); `n_valid_R` is 0 for a cold user or a candidate without
    a vector.
    """

    asked: pl.DataFrame
    simtier_RN: np.ndarray
    recent_RN: np.ndarray
    n_valid_R: np.ndarray


def simtier_for(
    requests: pl.DataFrame,
    events: pl.DataFrame,
    vectors: ItemVectors,
    *,
    k: int = 50,
    recent: int = RECENT,
    lag: int = 0,
    threads: int = 2,
    backend: Backend = "numba",
) -> SimTiers:
    """What `gsu topk --emit simtier` stores, for requests and the log of their users as frames in memory.

    `requests`: request_id, user_id, timestamp and `candidates` (a list) or `item_id` (flat); a candidate that
    a request repeats comes once. `events`: user_id, item_id, timestamp, ingested_at?, in any order; each
    request sees only what is strictly before its own time. `vectors`: `vectors.read_vectors(table)[0]`, or
    `vectors.held_vectors(ids, x_VD)` for arrays.
    """
    search = search_of(flat_requests(requests), events, lag=lag)
    table_VD, row_U = vectors.gather(search.items)
    found = topk(table_VD, search.with_rows(row_U), k=k, recent=recent, threads=threads, backend=backend)
    found = search.in_asked_order(found)
    return SimTiers(search.asked, count_tiers(found.sims_MK), count_tiers(found.recent_MS), found.n_valid_M)
