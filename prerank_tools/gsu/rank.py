"""The exact finish of a search: float64 cosines of what a shortlist holds, best first, ties to the later."""
# C candidates, n behaviours, B capacity, K kept, V vectors, D dims

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from prerank_tools.compiled import kernel
from prerank_tools.gsu.cosine import pad_lanes
from prerank_tools.gsu.search import RECENT, Groups, TopK, empty_topk
from prerank_tools.gsu.select import Shortlists, cut
from prerank_tools.gsu.simd import LANES, count_above, fetch_row, lane_dot, widen_row
from prerank_tools.gsu.simtier import PAD_SIM

AHEAD = 8  # rows asked for before they are read


class Past(NamedTuple):
    """A history: rows of the table, inverse norms (0 without a vector), running count of vectors."""

    rows_n: np.ndarray
    inverse_n: np.ndarray
    with_vector_n: np.ndarray


def cosines_at(
    table_VD: np.ndarray,
    groups: Groups,
    positions_MK: np.ndarray,
    *,
    recent: int = RECENT,
    dtype: type[np.floating] = np.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact cosines of behaviours chosen in some other way, and of the latest ones; padded like `TopK`."""
    found = empty_topk(len(positions_MK), k=positions_MK.shape[1], recent=recent)
    found = found._replace(positions_MK=positions_MK, sims_MK=found.sims_MK.astype(dtype))
    _cosines_at(stored_bits(table_VD), groups, groups.of_candidates(), found)
    return found.sims_MK, found.recent_MS


def stored_bits(table_VD: np.ndarray) -> np.ndarray:
    """The table as the kernels read it: float16 as its bits, width a multiple of 16, contiguous."""
    if table_VD.dtype not in (np.float32, np.float16, np.int8):
        table_VD = table_VD.astype(np.float32)
    table_VD = pad_lanes(table_VD)
    return table_VD.view(np.uint16) if table_VD.dtype == np.float16 else table_VD


@kernel
def past_of(table_VD: np.ndarray, groups: Groups, group: int) -> Past:
    """The history of a group, its norms taken and counted."""
    rows_n = groups.history_rows_N[groups.history_offsets[group] : groups.history_offsets[group + 1]]
    past = Past(rows_n, inverses_of(table_VD, rows_n), np.zeros(len(rows_n) + 1, dtype=np.int64))
    count_vectors(past)
    return past


@kernel(inlined=True)
def count_vectors(past: Past) -> None:
    """Fill in the running count, once the norms are there."""
    for i in range(len(past.rows_n)):
        past.with_vector_n[i + 1] = past.with_vector_n[i] + (past.inverse_n[i] > 0.0)


@kernel(inlined=True)
def inverse_norm(table_VD: np.ndarray, row: int) -> float:
    """`cosine.inverse_norms` of a row of the table; 0 for row -1."""
    if row < 0:
        return 0.0
    square = lane_dot(table_VD, row, table_VD, row)
    if np.isfinite(square) and square > 0.0:
        return 1.0 / np.sqrt(square)
    return 0.0


@kernel
def finish_block(
    table_VD: np.ndarray, past: Past, groups: Groups, first: int, last: int, lists: Shortlists, found: TopK
) -> None:
    """Rows `first` .. `last` of `found`, from their shortlists; all of `past` for those that have none."""
    k = found.positions_MK.shape[1]
    inverse_C = inverses_of(table_VD, groups.candidate_rows_M[first:last])
    exact_1B = np.zeros((1, lists.ids_CB.shape[1] + LANES))
    above_1B = np.empty(exact_1B.shape, dtype=np.int64)
    candidate_1D = np.empty((1, table_VD.shape[1]))
    for m in range(first, last):
        c, visible = m - first, groups.visible_M[m]
        if inverse_C[c] == 0.0:
            continue
        widen_row(table_VD, groups.candidate_rows_M[m], candidate_1D, 0)
        if lists.size_C[c] >= 0:
            kept = _finish(table_VD, past, candidate_1D, inverse_C[c], lists, c, exact_1B, above_1B, found, m)
        else:
            kept = _finish_all(table_VD, past, candidate_1D, inverse_C[c], visible, found, m)
        found.n_valid_M[m] = past.with_vector_n[visible] if kept == k else kept
        _recent(table_VD, past, candidate_1D, inverse_C[c], visible, found, m)


@kernel(inlined=True)
def _finish(
    table_VD: np.ndarray,
    past: Past,
    candidate_1D: np.ndarray,
    inverse: float,
    lists: Shortlists,
    c: int,
    exact_1B: np.ndarray,
    above_1B: np.ndarray,
    found: TopK,
    m: int,
) -> int:
    """Exact cosines of shortlist `c`, best K first into row `m` of `found`; how many there are."""
    ids_B, size, left = lists.ids_CB[c], 0, 0
    low = cut(lists, c, lists.size_C[c], found.positions_MK.shape[1])
    # Without a branch: which entries stay is not to be guessed, and a wrong guess would stop the cosines.
    for b in range(lists.size_C[c]):
        ids_B[size] = ids_B[b]
        size += lists.kept_CB[c, b] >= low
    for b in range(size):
        fetch_row(table_VD, past.rows_n[ids_B[min(b + AHEAD, size - 1)]])
        sim = _cosine_at(table_VD, past, candidate_1D, inverse, ids_B[b])
        exact_1B[0, left] = sim
        ids_B[left] = ids_B[b]
        left += sim != 0.0
    return order_best(exact_1B, above_1B, ids_B, left, found.positions_MK[m], found.sims_MK[m])


@kernel
def _finish_all(
    table_VD: np.ndarray,
    past: Past,
    candidate_1D: np.ndarray,
    inverse: float,
    visible: int,
    found: TopK,
    m: int,
) -> int:
    """The same over every visible behaviour: short histories, and rows whose shortlist did not fit."""
    positions_K, k, kept = found.positions_MK[m], found.positions_MK.shape[1], 0
    best_K = np.empty(k)
    # Latest first, so that an equal cosine stays behind: ties go to the later behaviour.
    for position in range(visible - 1, -1, -1):
        sim = _cosine_at(table_VD, past, candidate_1D, inverse, position)
        if sim == 0.0 or (kept == k and sim <= best_K[k - 1]):
            continue
        at = min(kept, k - 1)
        while at > 0 and best_K[at - 1] < sim:
            best_K[at] = best_K[at - 1]
            positions_K[at] = positions_K[at - 1]
            at -= 1
        best_K[at], positions_K[at] = sim, position
        kept = min(kept + 1, k)
    for i in range(kept):
        found.sims_MK[m, i] = best_K[i]
    return kept


@kernel(inlined=True)
def _cosine_at(
    table_VD: np.ndarray, past: Past, candidate_1D: np.ndarray, inverse: float, position: int
) -> float:
    """`cosine.exact_cosines` of a float64 candidate and a behaviour; 0 where that has no vector."""
    if past.inverse_n[position] == 0.0:
        return 0.0
    dot: float = lane_dot(table_VD, past.rows_n[position], candidate_1D, 0)
    return dot * inverse * past.inverse_n[position]


@kernel(inlined=True)
def order_best(
    exact_1B: np.ndarray,
    above_1B: np.ndarray,
    ids_B: np.ndarray,
    size: int,
    positions_K: np.ndarray,
    sims_K: np.ndarray,
) -> int:
    """Place each by how many are greater; equal ones are met latest first and take the next free place."""
    k, steps = len(positions_K), (size + LANES - 1) // LANES
    for step in range(steps):
        count_above(exact_1B, size, step, above_1B)
    for b in range(size - 1, -1, -1):
        place = above_1B[0, b]
        while place < k and positions_K[place] >= 0:
            place += 1
        if place < k:
            positions_K[place] = ids_B[b]
            sims_K[place] = exact_1B[0, b]
    return min(size, k)


@kernel(inlined=True)
def _recent(
    table_VD: np.ndarray,
    past: Past,
    candidate_1D: np.ndarray,
    inverse: float,
    visible: int,
    found: TopK,
    m: int,
) -> None:
    for s in range(min(found.recent_MS.shape[1], visible)):
        sim = _cosine_at(table_VD, past, candidate_1D, inverse, visible - 1 - s)
        found.recent_MS[m, s] = sim if sim != 0.0 else PAD_SIM


@kernel
def inverses_of(table_VD: np.ndarray, rows_n: np.ndarray) -> np.ndarray:
    inverse_n = np.empty(len(rows_n), dtype=np.float64)
    for i in range(len(rows_n)):
        inverse_n[i] = inverse_norm(table_VD, rows_n[i])
    return inverse_n


@kernel
def _cosines_at(table_VD: np.ndarray, groups: Groups, group_M: np.ndarray, found: TopK) -> None:
    inverse_M = inverses_of(table_VD, groups.candidate_rows_M)
    candidate_1D = np.empty((1, table_VD.shape[1]))
    for m in range(len(group_M)):
        if m == 0 or group_M[m] != group_M[m - 1]:
            past = past_of(table_VD, groups, group_M[m])
        if inverse_M[m] == 0.0:
            continue
        widen_row(table_VD, groups.candidate_rows_M[m], candidate_1D, 0)
        for i in range(found.positions_MK.shape[1]):
            at = found.positions_MK[m, i]
            if at >= 0:
                found.sims_MK[m, i] = _cosine_at(table_VD, past, candidate_1D, inverse_M[m], at)
        _recent(table_VD, past, candidate_1D, inverse_M[m], groups.visible_M[m], found, m)
