"""Exact cosine top-K on the CPU: bf16 products of whole blocks, shortlists, a float64 re-check."""
# G groups, C candidates, n behaviours of a group, V vectors, D dims, K kept, S recent, B capacity

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from prerank_tools.gsu.cosine import pad_lanes
from prerank_tools.gsu.search import RECENT, Groups, TopK, empty_topk
from prerank_tools.gsu.select import Past, Shortlists, absorb, cosine_at, finish, finish_all
from prerank_tools.gsu.simd import LANES, kernel, lane_dot, unit_bf16_row, widen_row
from prerank_tools.gsu.simtier import PAD_SIM, TIERS

CHUNK = 8192  # behaviours whose products are held at once
BLOCK = 256  # candidates whose products are held at once: 256 x 8192 bf16 is 4 MiB
SUPER = 2048  # candidates of a group that pass over its history together
SHORT = 160  # a history this short is cheaper scored exactly than selected from
FEW = 3  # so is any history for this few candidates
CAPACITY = 1024  # shortlist entries a candidate; a row that needs more is scored exactly
MAX_LOSS = 2.0**-8 * 1.001  # length of what rounding a unit vector to bf16 can lose


def topk_numba(
    table_VD: np.ndarray, groups: Groups, *, k: int = 50, recent: int = RECENT, threads: int = 2
) -> TopK:
    """`search.topk` on `threads` cores; scratch memory is bounded by the chunk, however long a history."""
    found = empty_topk(len(groups.candidate_rows_M), k=k, recent=recent)
    table_VD = stored_bits(table_VD)
    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(lambda span: _search(table_VD, groups, found, span), _spans(groups, threads * 8)))
    torch.set_num_threads(before)
    return found


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


def count_tiers(sims_MK: np.ndarray) -> np.ndarray:
    """`simtier.simtier`, ten times as fast."""
    counts_MN = np.zeros((len(sims_MK), TIERS), dtype=np.uint8)
    _count_tiers(np.ascontiguousarray(sims_MK, dtype=np.float32), counts_MN)
    return counts_MN


def stored_bits(table_VD: np.ndarray) -> np.ndarray:
    """The table as the kernels read it: float16 as its bits, width a multiple of 16, contiguous."""
    if table_VD.dtype not in (np.float32, np.float16, np.int8):
        table_VD = table_VD.astype(np.float32)
    table_VD = pad_lanes(table_VD)
    return table_VD.view(np.uint16) if table_VD.dtype == np.float16 else table_VD


class _Scratch(NamedTuple):
    """One thread's buffers, as large as its largest group needs and no larger than a chunk."""

    behaviors_nD: np.ndarray
    candidates_CD: np.ndarray
    products: np.ndarray
    ids_CB: np.ndarray
    kept_CB: np.ndarray

    @classmethod
    def of(cls, width: int, history: np.ndarray, asked: np.ndarray) -> _Scratch:
        n, c = min(int(history.max(initial=0)), CHUNK), min(int(asked.max(initial=0)), SUPER)
        return cls(
            behaviors_nD=np.empty((n, width), dtype=np.int16),
            candidates_CD=np.empty((_whole(c), width), dtype=np.int16),
            products=np.empty(n * min(_whole(c), BLOCK), dtype=np.int16),
            ids_CB=np.empty((c, CAPACITY), dtype=np.int32),
            kept_CB=np.empty((c, CAPACITY), dtype=np.int16),
        )


def _spans(groups: Groups, parts: int) -> Iterator[range]:
    """Runs of groups with about equal work, for the threads to take."""
    history, asked = np.diff(groups.history_offsets), np.diff(groups.candidate_offsets)
    work = np.cumsum((asked + 16.0) * (history + 64.0))
    cuts = np.searchsorted(work, work[-1] * np.arange(1, parts) / parts) if len(work) else []
    return (range(low, high) for low, high in pairwise(np.unique([0, *cuts, len(work)])))


def _search(table_VD: np.ndarray, groups: Groups, found: TopK, span: range) -> None:
    """Search a run of groups: long ones through products and shortlists, the others exactly as they stand."""
    history = np.diff(groups.history_offsets)[span.start : span.stop]
    asked = np.diff(groups.candidate_offsets)[span.start : span.stop]
    long = (history > max(SHORT, 2 * found.positions_MK.shape[1])) & (asked > FEW)
    scratch = _Scratch.of(table_VD.shape[1], history[long], asked[long])
    for group in np.flatnonzero(long) + span.start:
        _search_long(table_VD, groups, found, int(group), scratch)
    _search_short(table_VD, groups, found, np.flatnonzero(~long) + span.start)


def _search_long(table_VD: np.ndarray, groups: Groups, found: TopK, group: int, scratch: _Scratch) -> None:
    rows_n = groups.history_rows_N[groups.history_offsets[group] : groups.history_offsets[group + 1]]
    past = Past(rows_n, np.empty(len(rows_n)), np.zeros(len(rows_n) + 1, dtype=np.int64))
    first, last = groups.candidate_offsets[group : group + 2]
    for start in range(first, last, SUPER):
        span = range(start, min(start + SUPER, last))
        lists = _shortlists(table_VD, past, groups, span, found.positions_MK.shape[1], scratch)
        _finish(table_VD, past, groups, span.start, span.stop, lists, found)


def _shortlists(
    table_VD: np.ndarray, past: Past, groups: Groups, span: range, k: int, scratch: _Scratch
) -> Shortlists:
    """What can still be among the K best of each candidate, chunk by chunk of the history."""
    rows_C = groups.candidate_rows_M[span.start : span.stop]
    visible_C = groups.visible_M[span.start : span.stop]
    # Whole tiles of the matrix unit: 50 candidates cost a third more than 64.
    candidates_CD = scratch.candidates_CD[: _whole(len(rows_C))]
    candidates_CD[len(rows_C) :] = 0
    loss_C = _unit_rows(table_VD, rows_C, np.empty(len(rows_C)), candidates_CD)
    lists = Shortlists.of(len(rows_C), scratch.ids_CB, scratch.kept_CB)
    # All of the history, though no candidate may see its end: `past` is filled in on the way.
    for start in range(0, len(past.rows_n), CHUNK):
        chunk = slice(start, min(start + CHUNK, len(past.rows_n)))
        behaviors_nD = scratch.behaviors_nD[: chunk.stop - start]
        loss = _unit_rows(table_VD, past.rows_n[chunk], past.inverse_n[chunk], behaviors_nD).max()
        if len(past.rows_n) > CHUNK:
            # Thresholds outlive their chunk: they may rest on its own rounding only if it is the only one.
            loss = max(loss, MAX_LOSS)
        lists.slack_C[:] = loss_C * (1 + loss) + loss + table_VD.shape[1] * 2.0**-23 + 1e-6
        for low in range(0, len(rows_C), BLOCK):
            keys_Cn = _products(candidates_CD[low : low + BLOCK], behaviors_nD, scratch.products)
            absorb(keys_Cn[: len(rows_C) - low], start, low, visible_C, k, lists)
    np.cumsum(past.inverse_n > 0, out=past.with_vector_n[1:])
    return lists


def _products(candidates_CD: np.ndarray, behaviors_nD: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Cosines (C, n) in bf16, seen as int16."""
    keys_Cn = products[: len(candidates_CD) * len(behaviors_nD)]
    keys_Cn = keys_Cn.reshape(len(candidates_CD), len(behaviors_nD))
    torch.mm(_bf16(candidates_CD), _bf16(behaviors_nD).t(), out=_bf16(keys_Cn))
    return keys_Cn


def _whole(candidates: int) -> int:
    return -(-candidates // 32) * 32


def _bf16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)


@kernel
def _search_short(table_VD: np.ndarray, groups: Groups, found: TopK, wanted: np.ndarray) -> None:
    for group in wanted:
        past = _past(table_VD, groups, group)
        first, last = groups.candidate_offsets[group], groups.candidate_offsets[group + 1]
        nothing = Shortlists(
            np.empty(last - first, dtype=np.int16),
            np.empty(last - first, dtype=np.float32),
            np.full(last - first, -1, dtype=np.int64),
            np.empty((0, 0), dtype=np.int32),
            np.empty((0, 0), dtype=np.int16),
        )
        _finish(table_VD, past, groups, first, last, nothing, found)


@kernel
def _finish(
    table_VD: np.ndarray, past: Past, groups: Groups, first: int, last: int, lists: Shortlists, found: TopK
) -> None:
    k = found.positions_MK.shape[1]
    inverse_C = _inverses(table_VD, groups.candidate_rows_M[first:last])
    exact_1B = np.empty((1, lists.ids_CB.shape[1] + LANES))
    candidate_1D = np.empty((1, table_VD.shape[1]))
    for m in range(first, last):
        c, visible = m - first, groups.visible_M[m]
        if inverse_C[c] == 0.0:
            continue
        widen_row(table_VD, groups.candidate_rows_M[m], candidate_1D)
        if lists.size_C[c] >= 0:
            kept = finish(table_VD, past, candidate_1D, inverse_C[c], lists, c, exact_1B, found, m)
        else:
            kept = finish_all(table_VD, past, candidate_1D, inverse_C[c], visible, found, m)
        found.n_valid_M[m] = past.with_vector_n[visible] if kept == k else kept
        _recent(table_VD, past, candidate_1D, inverse_C[c], visible, found, m)


@kernel
def _cosines_at(table_VD: np.ndarray, groups: Groups, group_M: np.ndarray, found: TopK) -> None:
    inverse_M = _inverses(table_VD, groups.candidate_rows_M)
    candidate_1D = np.empty((1, table_VD.shape[1]))
    for m in range(len(group_M)):
        if m == 0 or group_M[m] != group_M[m - 1]:
            past = _past(table_VD, groups, group_M[m])
        if inverse_M[m] == 0.0:
            continue
        widen_row(table_VD, groups.candidate_rows_M[m], candidate_1D)
        for i in range(found.positions_MK.shape[1]):
            at = found.positions_MK[m, i]
            if at >= 0:
                found.sims_MK[m, i] = cosine_at(table_VD, past, candidate_1D, inverse_M[m], at)
        _recent(table_VD, past, candidate_1D, inverse_M[m], groups.visible_M[m], found, m)


@kernel
def _count_tiers(sims_MK: np.ndarray, counts_MN: np.ndarray) -> None:
    for m in range(sims_MK.shape[0]):
        for i in range(sims_MK.shape[1]):
            tier = int(np.ceil(sims_MK[m, i] * np.float32(10.0))) + 10
            if 0 <= tier < counts_MN.shape[1]:
                counts_MN[m, tier] += 1


@kernel
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
        sim = cosine_at(table_VD, past, candidate_1D, inverse, visible - 1 - s)
        found.recent_MS[m, s] = sim if sim != 0.0 else PAD_SIM


@kernel
def _past(table_VD: np.ndarray, groups: Groups, group: int) -> Past:
    rows_n = groups.history_rows_N[groups.history_offsets[group] : groups.history_offsets[group + 1]]
    inverse_n = _inverses(table_VD, rows_n)
    with_vector_n = np.zeros(len(rows_n) + 1, dtype=np.int64)
    for i in range(len(rows_n)):
        with_vector_n[i + 1] = with_vector_n[i] + (inverse_n[i] > 0.0)
    return Past(rows_n, inverse_n, with_vector_n)


@kernel
def _inverses(table_VD: np.ndarray, rows_n: np.ndarray) -> np.ndarray:
    """`cosine.inverse_norms` of rows of the table; 0 for row -1."""
    inverse_n = np.empty(len(rows_n), dtype=np.float64)
    for i in range(len(rows_n)):
        inverse_n[i] = _inverse(table_VD, rows_n[i])
    return inverse_n


@kernel
def _inverse(table_VD: np.ndarray, row: int) -> float:
    if row < 0:
        return 0.0
    square = lane_dot(table_VD, row, table_VD, row)
    if np.isfinite(square) and square > 0.0:
        return 1.0 / np.sqrt(square)
    return 0.0


@kernel
def _unit_rows(
    table_VD: np.ndarray, rows_n: np.ndarray, inverse_n: np.ndarray, out_nD: np.ndarray
) -> np.ndarray:
    """Unit rows as bf16 bits, zeros where there is no vector; the length each lost to rounding.

    Writes the exact inverse norms as well, so that a row is met once.
    """
    loss_n = np.zeros(len(rows_n), dtype=np.float64)
    for i in range(len(rows_n)):
        inverse_n[i] = _inverse(table_VD, rows_n[i])
        if 1e-30 < inverse_n[i] < 1e30:
            lost = unit_bf16_row(table_VD, rows_n[i], np.float32(inverse_n[i]), out_nD, i)
            loss_n[i] = np.sqrt(lost * 1.001)
        else:
            out_nD[i] = 0
            # A length that float32 cannot scale loses all of itself: lists overflow, rows are scored exactly.
            loss_n[i] = inverse_n[i] > 0.0
    return loss_n
