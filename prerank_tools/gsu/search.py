"""GSU: exact cosine top-K of each candidate against a user's whole past (MUSE, arXiv:2512.07216)."""
# G groups (users), N behaviours of all groups, M candidates of all groups, V vectors, D dims, K kept

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from prerank_tools.gsu.cosine import exact_cosines, inverse_norms
from prerank_tools.gsu.simtier import PAD_SIM

Backend = Literal["numpy", "numba", "faiss", "cuda"]
RECENT = 50


class Groups(NamedTuple):
    """Users batched together: ragged histories, oldest behaviour first, and the candidates asked about.

    Histories and candidates are rows of a table of vectors (a user's vectors are stored once for all of
    that user's candidates); row -1 is an item without a vector. A candidate sees the first `visible_M`
    behaviours of its group, so that requests of one user at different times share one history.
    """

    history_rows_N: np.ndarray
    history_offsets: np.ndarray  # (G + 1,)
    candidate_rows_M: np.ndarray
    candidate_offsets: np.ndarray  # (G + 1,)
    visible_M: np.ndarray

    def of_candidates(self) -> np.ndarray:
        """Group of each candidate (M,)."""
        return np.repeat(np.arange(len(self.history_offsets) - 1), np.diff(self.candidate_offsets))


class TopK(NamedTuple):
    """What a search found, best first; ties go to the later behaviour.

    `positions_MK`: index in the group's history (0 is the oldest), -1 where there is none. `sims_MK`: float32
    cosine, `PAD_SIM` where there is none. `n_valid_M`: visible behaviours that could be chosen, so that a row
    holds min(K, n_valid) of them. `recent_MS`: cosines of the latest behaviours, newest first, padded alike.
    """

    positions_MK: np.ndarray
    sims_MK: np.ndarray
    n_valid_M: np.ndarray
    recent_MS: np.ndarray


def topk(
    table_VD: np.ndarray,
    groups: Groups,
    *,
    k: int = 50,
    recent: int = RECENT,
    threads: int = 2,
    backend: Backend = "numba",
) -> TopK:
    """The K behaviours of highest cosine for each candidate, the same on every back end to the last bit.

    `table_VD` is float32, float16 or int8 (a scale per row cancels). Behaviours without a vector and
    exact-zero cosines never win; a candidate without a vector gets an empty row and `n_valid` 0.
    """
    if backend == "numpy":
        return topk_numpy(table_VD, groups, k=k, recent=recent)
    if backend == "numba":
        from prerank_tools.gsu.search_numba import topk_numba

        return topk_numba(table_VD, groups, k=k, recent=recent, threads=threads)
    if backend == "faiss":
        from prerank_tools.gsu.search_faiss import topk_faiss

        return topk_faiss(table_VD, groups, k=k, recent=recent, threads=threads)
    from prerank_tools.gsu.search_cuda import topk_cuda

    return topk_cuda(table_VD, groups, k=k, recent=recent)


def topk_numpy(table_VD: np.ndarray, groups: Groups, *, k: int = 50, recent: int = RECENT) -> TopK:
    """The definition: every cosine in float64, sorted: what the other back ends are tested against."""
    found = empty_topk(len(groups.candidate_rows_M), k=k, recent=recent)
    usable_V = inverse_norms(table_VD) > 0
    for candidate, group in enumerate(groups.of_candidates()):
        row, start = groups.candidate_rows_M[candidate], groups.history_offsets[group]
        rows_n = groups.history_rows_N[start : start + groups.visible_M[candidate]]
        if row < 0 or not usable_V[row]:
            continue
        sims_n = exact_cosines(table_VD[rows_n], table_VD[row][None])
        valid_n = (rows_n >= 0) & usable_V[rows_n] & (sims_n != 0)
        order = np.lexsort((-np.arange(len(rows_n)), -sims_n))
        best = order[valid_n[order]][:k]
        found.positions_MK[candidate, : len(best)] = best
        found.sims_MK[candidate, : len(best)] = sims_n[best]
        with_vector = int(((rows_n >= 0) & usable_V[rows_n]).sum())
        found.n_valid_M[candidate] = choosable(with_vector, len(best), k)
        latest = np.where(valid_n, sims_n, PAD_SIM)[::-1][:recent]
        found.recent_MS[candidate, : len(latest)] = latest
    return found


def choosable(with_vector: int, kept: int, k: int) -> int:
    """Behaviours with a vector; where exact-zero cosines leave fewer than K of them, those that are left."""
    return kept if kept < k else with_vector


def empty_topk(candidates: int, *, k: int, recent: int) -> TopK:
    """Rows that hold nothing yet."""
    return TopK(
        positions_MK=np.full((candidates, k), -1, dtype=np.int32),
        sims_MK=np.full((candidates, k), PAD_SIM, dtype=np.float32),
        n_valid_M=np.zeros(candidates, dtype=np.int32),
        recent_MS=np.full((candidates, recent), PAD_SIM, dtype=np.float32),
    )
