"""Other ways to choose the K behaviours: by ID embeddings (SIM-soft), category (SIM-hard), SID prefix."""
# V items, L levels, D dims, M candidates, K kept, S recent

from __future__ import annotations

import numpy as np

from prerank_tools.compiled import kernel
from prerank_tools.gsu.cosine import inverse_norms
from prerank_tools.gsu.rank import cosines_at
from prerank_tools.gsu.search import RECENT, Groups, TopK, empty_topk, topk

# Each mode chooses by its own measure and reports the cosine of the content vectors: SimTier and the
# attention after it take the content cosine of whatever was retrieved (MUSE, table "GSU embedding").


def topk_by_ids(
    id_VE: np.ndarray,
    table_VD: np.ndarray,
    groups: Groups,
    *,
    k: int = 50,
    recent: int = RECENT,
    threads: int = 2,
) -> TopK:
    """SIM-soft: the K behaviours of highest cosine between ID embeddings; order and ties as in `search.topk`.

    `id_VE` and `table_VD` have the same rows. Only behaviours and candidates with both vectors take part.
    """
    both_V = np.append((inverse_norms(id_VE) > 0) & (inverse_norms(table_VD) > 0), False)
    kept = groups._replace(
        history_rows_N=np.where(both_V[groups.history_rows_N], groups.history_rows_N, -1),
        candidate_rows_M=np.where(both_V[groups.candidate_rows_M], groups.candidate_rows_M, -1),
    )
    found = topk(id_VE, kept, k=k, recent=0, threads=threads)
    sims_MK, recent_MS = cosines_at(table_VD, groups, found.positions_MK, recent=recent)
    return found._replace(sims_MK=sims_MK, recent_MS=recent_MS)


def topk_by_prefix(
    code_VL: np.ndarray, table_VD: np.ndarray, groups: Groups, *, k: int = 50, recent: int = RECENT
) -> TopK:
    """The K behaviours that share the longest prefix of codes with the candidate, the latest of them first.

    Levels 1-2-3, then 1-2, then 1 fill up what is left (back-off; latest first inside a level is ours). One
    level of category codes is SIM-hard: same category, most recent K. Codes below 0 match nothing; behaviours
    without a vector are not chosen. `code_VL` and `table_VD` have the same rows.
    """
    found = empty_topk(len(groups.candidate_rows_M), k=k, recent=0)
    code_VL = np.ascontiguousarray(code_VL, dtype=np.int64)
    _choose(code_VL, inverse_norms(table_VD) > 0, groups, groups.of_candidates(), found)
    sims_MK, recent_MS = cosines_at(table_VD, groups, found.positions_MK, recent=recent)
    return found._replace(sims_MK=sims_MK, recent_MS=recent_MS)


@kernel
def _choose(
    code_VL: np.ndarray, usable_V: np.ndarray, groups: Groups, group_M: np.ndarray, found: TopK
) -> None:
    for m in range(len(group_M)):
        row, first, kept = groups.candidate_rows_M[m], groups.history_offsets[group_M[m]], 0
        if row < 0 or not usable_V[row]:
            continue
        for wanted in range(code_VL.shape[1], 0, -1):
            for position in range(groups.visible_M[m] - 1, -1, -1):
                behavior = groups.history_rows_N[first + position]
                if behavior < 0 or not usable_V[behavior] or _shared(code_VL, row, behavior) != wanted:
                    continue
                found.n_valid_M[m] += 1
                if kept < found.positions_MK.shape[1]:
                    found.positions_MK[m, kept] = position
                    kept += 1


@kernel
def _shared(code_VL: np.ndarray, a: int, b: int) -> int:
    """How many codes two items share from the first level on."""
    level = 0
    while level < code_VL.shape[1] and code_VL[a, level] >= 0 and code_VL[a, level] == code_VL[b, level]:
        level += 1
    return level
