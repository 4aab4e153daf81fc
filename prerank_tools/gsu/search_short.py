"""Exact cosine top-K over histories too short for a shortlist to pay: every cosine, in float64, in blocks."""
# C candidates of a tile, n behaviours of a group, T blocks, V vectors, D dims, B capacity, K kept

from __future__ import annotations

import numpy as np

from prerank_tools.compiled import kernel
from prerank_tools.gsu.rank import Past, inverses_of, order_best, past_of
from prerank_tools.gsu.search import Groups, TopK
from prerank_tools.gsu.simd import LANES, count_reaching, lane_dots_4x2, widen_row
from prerank_tools.gsu.simtier import PAD_SIM

TILE = 16  # candidates whose rows stay in the first cache while the history passes
ABSENT = -3.0  # in place of a cosine that cannot win; below every cosine
LOWEST, HIGHEST = -1.01, 1.01  # around every cosine
SPARE = 12  # behaviours beyond K that are put in order with them: cheaper than a closer threshold
HALVINGS = 12


@kernel
def search_short(
    table_VD: np.ndarray,
    groups: Groups,
    found: TopK,
    group_T: np.ndarray,
    first_T: np.ndarray,
    last_T: np.ndarray,
) -> None:
    """Rows `first_T` .. `last_T` of `found`, candidates of the groups `group_T`, as `search.topk` has them.

    Holds the longest of those histories in float64, and its cosines with a tile of candidates.
    """
    longest = LANES
    for group in group_T:
        longest = max(longest, groups.history_offsets[group + 1] - groups.history_offsets[group])
    room = (longest + LANES - 1) // LANES * LANES
    behaviors_nD = np.empty((room, table_VD.shape[1]))
    candidates_CD = np.zeros((TILE, table_VD.shape[1]))
    sims_Cn = np.empty((TILE, room))
    exact_1B, above_1B = np.empty((1, room + LANES)), np.empty((1, room + LANES), dtype=np.int64)
    ids_B = np.empty(room + LANES, dtype=np.int32)
    for t in range(len(group_T)):
        past = past_of(table_VD, groups, group_T[t])
        _widen(table_VD, past.rows_n, past.inverse_n, behaviors_nD)
        for first in range(first_T[t], last_T[t], TILE):
            last = min(first + TILE, last_T[t])
            rows_C = groups.candidate_rows_M[first:last]
            inverse_C = inverses_of(table_VD, rows_C)
            _widen(table_VD, rows_C, inverse_C, candidates_CD)
            seen = groups.visible_M[first:last].max()
            for i in range(0, seen, 4):
                for c in range(0, last - first, 2):
                    lane_dots_4x2(behaviors_nD, i, candidates_CD, c, sims_Cn)
            for m in range(first, last):
                if inverse_C[m - first] > 0.0:
                    _rank(
                        sims_Cn,
                        m - first,
                        inverse_C[m - first],
                        past,
                        exact_1B,
                        above_1B,
                        ids_B,
                        groups,
                        found,
                        m,
                    )


@kernel(inlined=True)
def _widen(table_VD: np.ndarray, rows_N: np.ndarray, inverse_N: np.ndarray, out_ND: np.ndarray) -> None:
    """Rows as float64, zeros where there is no vector and up to a multiple of four."""
    for i in range(len(rows_N)):
        if inverse_N[i] > 0.0:
            widen_row(table_VD, rows_N[i], out_ND, i)
        else:
            out_ND[i] = 0.0
    for i in range(len(rows_N), min((len(rows_N) + 3) // 4 * 4, len(out_ND))):
        out_ND[i] = 0.0


@kernel(inlined=True)
def _rank(
    sims_Cn: np.ndarray,
    c: int,
    inverse: float,
    past: Past,
    exact_1B: np.ndarray,
    above_1B: np.ndarray,
    ids_B: np.ndarray,
    groups: Groups,
    found: TopK,
    m: int,
) -> None:
    """Row `m` of `found`, from the dots in row `c`."""
    visible, k = groups.visible_M[m], found.positions_MK.shape[1]
    for i in range(visible):
        sim = sims_Cn[c, i] * inverse * past.inverse_n[i]
        sims_Cn[c, i] = sim if sim != 0.0 else ABSENT
    for s in range(min(found.recent_MS.shape[1], visible)):
        sim = sims_Cn[c, visible - 1 - s]
        found.recent_MS[m, s] = sim if sim != ABSENT else PAD_SIM
    low = _threshold(sims_Cn, c, visible, k) if visible > k + SPARE else LOWEST
    size = 0
    for i in range(visible):  # without a branch: which ones stay is not to be guessed
        exact_1B[0, size] = sims_Cn[c, i]
        ids_B[size] = i
        size += sims_Cn[c, i] >= low
    kept = order_best(exact_1B, above_1B, ids_B, size, found.positions_MK[m], found.sims_MK[m])
    found.n_valid_M[m] = past.with_vector_n[visible] if kept == k else kept


@kernel(inlined=True)
def _threshold(sims_Cn: np.ndarray, c: int, visible: int, k: int) -> float:
    """A cosine that K of the row reach, and as a rule few more; below all where there are no K."""
    whole = (visible + LANES - 1) // LANES * LANES
    for i in range(visible, whole):
        sims_Cn[c, i] = ABSENT
    low, high = LOWEST, HIGHEST
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        reaching = count_reaching(sims_Cn, c, whole, middle)
        if reaching >= k:
            low = middle
            if reaching <= k + SPARE:
                break
        else:
            high = middle
    return low
