"""Colliding items move to another code of the last level, so that their prefix, the coarse meaning, stays."""

# N items, K codes of the last level, R rows to move, M SIDs in use,
# S groups of G items
from __future__ import annotations

from collections.abc import Callable, Iterator

import numba
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from prerank_tools.quantizers.sid_keys import group_starts, order_by_key, place_in_group
from prerank_tools.quantizers.sinkhorn import sinkhorn_lcrec

LastDistances = Callable[[np.ndarray], np.ndarray]  # rows_R -> d_RK to every code of the last level

CHUNK = 8_192  # rows whose distances are held at once
ROUNDS = 20  # LC-Rec
PLAN_CELLS = 1 << 21  # distances in one batch of Sinkhorn groups


def move_last(
    key_N: np.ndarray,
    ids_N: np.ndarray,
    fixed_N: np.ndarray,
    *,
    codes: int,
    policy: str,
    distances: LastDistances,
    room: int = 1,
) -> np.ndarray:
    """Last-level codes (N,) int64 by `capacity`, `sinkhorn` or `optimal`; rows in `fixed_N` keep theirs."""
    if policy == "capacity":
        return _next_nearest(key_N, ids_N, fixed_N, codes, distances, room)
    if policy == "sinkhorn":
        return _sinkhorn_rounds(key_N, ids_N, fixed_N, codes, distances)
    return _optimal(key_N, ids_N, fixed_N, codes, distances)


def _next_nearest(
    key_N: np.ndarray,
    ids_N: np.ndarray,
    fixed_N: np.ndarray,
    codes: int,
    distances: LastDistances,
    room: int,
) -> np.ndarray:
    """FORGE: at most `room` items a SID; the others, in id order, take their nearest last code with room.

    FORGE keeps random items of a full SID and looks among the 200 nearest codes; ours keeps the published
    ones, then those of lowest id, and looks at all codes.
    """
    last_N = key_N % codes
    order_N = order_by_key(key_N, ids_N)
    # Stable sorts: published items come first in their SID, so they are the ones that stay.
    order_N = order_N[np.argsort(~fixed_N[order_N], kind="stable")]
    order_N = order_N[np.argsort(key_N[order_N], kind="stable")]
    stays_N = np.empty(len(key_N), dtype=bool)
    stays_N[order_N] = place_in_group(key_N[order_N]) < room
    stays_N |= fixed_N
    rows_R = np.flatnonzero(~stays_N)
    rows_R = rows_R[order_by_key(key_N[rows_R] // codes, ids_N[rows_R])]
    kept_M, count_M = np.unique(key_N[stays_N], return_counts=True)
    used_K, at_prefix = np.zeros(codes, dtype=np.int64), -1
    for chunk_R in _chunks(rows_R):
        prefix_R = key_N[chunk_R] // codes
        taken_R = _take_free(prefix_R, distances(chunk_R), kept_M, count_M, room, used_K, at_prefix)
        at_prefix = int(prefix_R[-1])
        last_N[chunk_R] = np.where(taken_R >= 0, taken_R, last_N[chunk_R])
    return last_N


@numba.njit(cache=True)
def _take_free(
    prefix_R: np.ndarray,
    d_RK: np.ndarray,
    kept_M: np.ndarray,
    count_M: np.ndarray,
    room: int,
    used_K: np.ndarray,
    at_prefix: int,
) -> np.ndarray:
    """Each row's nearest code with room, the lowest of equals, or -1; `used_K` counts prefix `at_prefix`."""
    taken_R = np.full(len(prefix_R), -1, dtype=np.int64)
    codes = len(used_K)
    for row in range(len(prefix_R)):
        prefix = prefix_R[row]
        if prefix != at_prefix:
            used_K[:] = 0
            at = np.searchsorted(kept_M, prefix * codes)
            while at < len(kept_M) and kept_M[at] < (prefix + 1) * codes:
                used_K[kept_M[at] - prefix * codes] = count_M[at]
                at += 1
            at_prefix = prefix
        for code in range(codes):
            nearer = taken_R[row] < 0 or d_RK[row, code] < d_RK[row, taken_R[row]]
            if nearer and used_K[code] < room:
                taken_R[row] = code
        if taken_R[row] >= 0:
            used_K[taken_R[row]] += 1
    return taken_R


def _sinkhorn_rounds(
    key_N: np.ndarray, ids_N: np.ndarray, fixed_N: np.ndarray, codes: int, distances: LastDistances
) -> np.ndarray:
    """LC-Rec: re-assign every colliding group by Sinkhorn on the last level, up to 20 rounds.

    Identical vectors have identical rows in the plan, so they never part: that is the duplicate floor.
    """
    key_N = key_N.copy()
    for _ in range(ROUNDS):
        before_N = key_N.copy()
        for rows_SG in _equal_sized(*_colliding(key_N, ids_N), codes):
            d_SGK = torch.from_numpy(distances(rows_SG.ravel())).double().view(*rows_SG.shape, codes)
            code_SG = sinkhorn_lcrec(d_SGK).argmax(dim=-1).numpy()
            code_SG = np.where(fixed_N[rows_SG], key_N[rows_SG] % codes, code_SG)
            key_N[rows_SG] += code_SG - key_N[rows_SG] % codes
        if (key_N == before_N).all():
            break
    return key_N % codes


def _equal_sized(rows_R: np.ndarray, sizes_S: np.ndarray, codes: int) -> Iterator[np.ndarray]:
    """Groups of one size stacked (S, G), so that small groups share a call; the order is fixed."""
    starts_S = np.cumsum(sizes_S) - sizes_S
    for size in np.unique(sizes_S):
        at_S = starts_S[sizes_S == size]
        step = max(1, PLAN_CELLS // (int(size) * codes))
        for start in range(0, len(at_S), step):
            yield rows_R[at_S[start : start + step, None] + np.arange(size)]


def _optimal(
    key_N: np.ndarray, ids_N: np.ndarray, fixed_N: np.ndarray, codes: int, distances: LastDistances
) -> np.ndarray:
    """Ours: in every prefix that holds a collision, the one-to-one assignment of least total distance.

    A prefix with more items than free codes cannot be made one-to-one: its items take the next nearest
    code with room for ceil(items / K) (Hungarian on more rows than codes would cost cubic time for nothing).
    """
    last_N = key_N % codes
    prefix_N = key_N // codes
    crowded_R, _ = _colliding(key_N, ids_N)
    rows_R = np.flatnonzero(np.isin(prefix_N, prefix_N[crowded_R]))
    rows_R = rows_R[order_by_key(prefix_N[rows_R], ids_N[rows_R])]
    for rows_G in np.split(rows_R, group_starts(prefix_N[rows_R])[1:]):
        free_G = rows_G[~fixed_N[rows_G]]
        taken_K = np.isin(np.arange(codes), last_N[rows_G[fixed_N[rows_G]]])
        if len(free_G) <= codes - taken_K.sum():
            d_GK = distances(free_G).astype(np.float64)[:, ~taken_K]
            last_N[free_G] = np.flatnonzero(~taken_K)[linear_sum_assignment(d_GK)[1]]
        elif len(free_G):
            room = -(-len(rows_G) // codes)
            last_N[rows_G] = _next_nearest(
                key_N[rows_G], ids_N[rows_G], fixed_N[rows_G], codes, _of_rows(distances, rows_G), room
            )
    return last_N


def _colliding(key_N: np.ndarray, ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that share a SID, in (key, id) order, and the size of each such group."""
    order_N = order_by_key(key_N, ids_N)
    sizes_M = np.diff(group_starts(key_N[order_N]), append=len(order_N))
    return order_N[np.repeat(sizes_M > 1, sizes_M)], sizes_M[sizes_M > 1]


def _chunks(rows_R: np.ndarray) -> Iterator[np.ndarray]:
    return (rows_R[start : start + CHUNK] for start in range(0, len(rows_R), CHUNK))


def _of_rows(distances: LastDistances, rows_G: np.ndarray) -> LastDistances:
    return lambda at_R: distances(rows_G[at_R])
