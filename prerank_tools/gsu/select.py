"""Choose the top K from blocks of bf16 products: a threshold that cuts no winner, an exact finish.

With t the K-th largest product and every product within `slack` of the true cosine, a behaviour below
t - rounding(t) - 2 slack cannot be among the K best. Products are compared as int16 views of their bf16 bits,
which are in order for positive numbers; a row whose threshold is not clearly positive is made so for all.
"""
# C candidates, n behaviours of a chunk, B capacity, K kept, V vectors, D dims, G groups of behaviours

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from prerank_tools.gsu.search import TopK
from prerank_tools.gsu.simd import (
    LANES,
    at_least_32,
    count_above,
    kernel,
    lane_dot,
    raise_to_32,
    set_bits,
    trailing_zeros,
)

LOWEST = np.int16(-32768)


class Past(NamedTuple):
    """A history: rows of the table, inverse norms (0 without a vector), running count of vectors."""

    rows_n: np.ndarray
    inverse_n: np.ndarray
    with_vector_n: np.ndarray


class Shortlists(NamedTuple):
    """Positions and products that can still win; `size_C` is -1 where they did not fit.

    `low_C` is the running threshold, `slack_C` how far a product can be from its cosine.
    """

    low_C: np.ndarray
    slack_C: np.ndarray
    size_C: np.ndarray
    ids_CB: np.ndarray
    kept_CB: np.ndarray

    @classmethod
    def of(cls, candidates: int, ids_CB: np.ndarray, kept_CB: np.ndarray) -> Shortlists:
        """Empty lists in these buffers."""
        return cls(
            low_C=np.full(candidates, LOWEST),
            slack_C=np.zeros(candidates, dtype=np.float32),
            size_C=np.zeros(candidates, dtype=np.int64),
            ids_CB=ids_CB[:candidates],
            kept_CB=kept_CB[:candidates],
        )


@kernel
def absorb(
    keys_Cn: np.ndarray, start: int, first: int, visible_C: np.ndarray, k: int, lists: Shortlists
) -> None:
    """Add what can win among behaviours `start ..` to the shortlists of the candidates from `first` on."""
    maxima = np.empty((1, _groups_for(k)), dtype=np.int16)
    for row in range(keys_Cn.shape[0]):
        c = first + row
        n = min(keys_Cn.shape[1], visible_C[c] - start)
        if n <= 0 or lists.size_C[c] < 0:
            continue
        if lists.low_C[c] <= 0:
            low = _low_from_maxima(keys_Cn, row, n, k, lists.slack_C[c], maxima)
            if low <= 0:
                _make_monotone(keys_Cn, row, n)
                low = _low_by_counting(keys_Cn, row, n, k, lists.slack_C[c])
            lists.low_C[c] = max(lists.low_C[c], low)
        _collect(keys_Cn, row, n, start, k, lists, c)


@kernel
def finish(
    table_VD: np.ndarray,
    past: Past,
    candidate_1D: np.ndarray,
    inverse: float,
    lists: Shortlists,
    c: int,
    exact_1B: np.ndarray,
    found: TopK,
    m: int,
) -> int:
    """Exact cosines of shortlist `c`, best K first into row `m` of `found`; how many there are."""
    left, ids_B = 0, lists.ids_CB[c]
    whole = (lists.size_C[c] + 31) // 32 * 32
    for b in range(lists.size_C[c], whole):
        lists.kept_CB[c, b] = LOWEST
    cut = _low_by_counting(lists.kept_CB, c, whole, found.positions_MK.shape[1], lists.slack_C[c])
    low = max(lists.low_C[c], cut)
    for b in range(lists.size_C[c]):
        if lists.kept_CB[c, b] >= low:
            sim = cosine_at(table_VD, past, candidate_1D, inverse, ids_B[b])
            if sim != 0.0:
                exact_1B[0, left] = sim
                ids_B[left] = ids_B[b]
                left += 1
    return _order(exact_1B, ids_B, left, found.positions_MK[m], found.sims_MK[m])


@kernel
def finish_all(
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
        sim = cosine_at(table_VD, past, candidate_1D, inverse, position)
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


@kernel
def cosine_at(
    table_VD: np.ndarray, past: Past, candidate_1D: np.ndarray, inverse: float, position: int
) -> float:
    """`cosine.exact_cosines` of a float64 candidate and a behaviour; 0 where that has no vector."""
    if past.inverse_n[position] == 0.0:
        return 0.0
    dot: float = lane_dot(table_VD, past.rows_n[position], candidate_1D, 0)
    return dot * inverse * past.inverse_n[position]


@kernel
def _order(
    exact_1B: np.ndarray, ids_B: np.ndarray, size: int, positions_K: np.ndarray, sims_K: np.ndarray
) -> int:
    """Place each by how many are greater; equal ones are met latest first and take the next free place."""
    k, steps = len(positions_K), (size + LANES - 1) // LANES
    for b in range(size, steps * LANES):
        exact_1B[0, b] = -2.0
    for b in range(size - 1, -1, -1):
        place = count_above(exact_1B, steps, exact_1B[0, b])
        while place < k and positions_K[place] >= 0:
            place += 1
        if place < k:
            positions_K[place] = ids_B[b]
            sims_K[place] = exact_1B[0, b]
    return min(size, k)


@kernel
def _collect(keys_Cn: np.ndarray, row: int, n: int, start: int, k: int, lists: Shortlists, c: int) -> None:
    size, capacity = lists.size_C[c], lists.ids_CB.shape[1]
    for block in range(0, n, 32):
        if size + 32 > capacity:
            size = _compact(c, size, k, lists)
            if size + 32 > capacity:
                lists.size_C[c] = -1
                return
        bits = _mask(keys_Cn, row, block, n, lists.low_C[c])
        while bits:
            at = block + trailing_zeros(bits)
            lists.ids_CB[c, size] = start + at
            lists.kept_CB[c, size] = keys_Cn[row, at]
            size += 1
            bits &= bits - 1
    lists.size_C[c] = size


@kernel
def _compact(c: int, size: int, k: int, lists: Shortlists) -> int:
    cut = _low_by_counting(lists.kept_CB, c, size, k, lists.slack_C[c])
    lists.low_C[c] = max(lists.low_C[c], cut)
    left = 0
    for b in range(size):
        if lists.kept_CB[c, b] >= lists.low_C[c]:
            lists.ids_CB[c, left] = lists.ids_CB[c, b]
            lists.kept_CB[c, left] = lists.kept_CB[c, b]
            left += 1
    return left


# A behaviour belongs to group (position mod G). The K-th largest of the groups' maxima is reached by at least
# K behaviours, and by few more because G is well above K: it costs one vector maximum per 32 behaviours.
@kernel
def _low_from_maxima(keys_Cn: np.ndarray, c: int, n: int, k: int, slack: float, maxima: np.ndarray) -> Any:
    """Threshold, or 0 if it is not clear of zero, where missing vectors and exact-zero cosines lie."""
    width = maxima.shape[1]
    maxima[:] = LOWEST
    whole = n // 32 * 32
    for block in range(0, whole, 32):
        raise_to_32(maxima, block % width, keys_Cn, c, block)
    for i in range(whole, n):
        maxima[0, i % width] = max(maxima[0, i % width], keys_Cn[c, i])
    low = _below(_kth_largest(maxima, 0, width, k, np.int16(0)), slack)
    return low if low > _zero_key(slack) else np.int16(0)


@kernel
def _low_by_counting(keys_Cn: np.ndarray, c: int, n: int, k: int, slack: float) -> Any:
    """Threshold over monotone keys; behaviours that may be exact zeros do not count among the K."""
    low = _below(_kth_largest(keys_Cn, c, n, k, LOWEST), slack)
    zero = _zero_key(slack)
    if low > zero:
        return low
    zeros = _count(keys_Cn, c, n, np.int16(-zero - 1)) - _count(keys_Cn, c, n, np.int16(zero + 1))
    return _below(_kth_largest(keys_Cn, c, n, k + zeros, LOWEST), slack)


@kernel
def _kth_largest(keys_Cn: np.ndarray, c: int, n: int, k: int, lowest: Any) -> Any:
    """The K-th largest of the first n keys of a row, or `lowest` if fewer than K reach it."""
    low, high = np.int64(lowest), np.int64(0x4000)  # products of unit rows are below 2.0
    while high - low > 1:
        middle = (low + high) >> 1
        if _count(keys_Cn, c, n, np.int16(middle)) >= k:
            low = middle
        else:
            high = middle
    return np.int16(low)


@kernel
def _count(keys_Cn: np.ndarray, c: int, n: int, low: Any) -> int:
    total = 0
    for block in range(0, n, 32):
        total += set_bits(_mask(keys_Cn, c, block, n, low))
    return total


@kernel
def _mask(keys_Cn: np.ndarray, c: int, block: int, n: int, low: Any) -> Any:
    if block + 32 <= n:
        return at_least_32(keys_Cn, c, block, low)
    bits = np.int64(0)
    for i in range(n - block):
        bits |= np.int64(keys_Cn[c, block + i] >= low) << i
    return bits


@kernel
def _make_monotone(keys_Cn: np.ndarray, c: int, n: int) -> None:
    for i in range(n):
        key = keys_Cn[c, i]
        keys_Cn[c, i] = key ^ ((key >> 15) & np.int16(0x7FFF))


@kernel
def _below(key: Any, slack: float) -> Any:
    """The key that no winner can be under, if the K-th largest product is `key`."""
    if key == LOWEST:
        return LOWEST
    value = _value(key)
    return np.int16(_key(value - abs(value) * np.float32(2.0**-8) - np.float32(2.0) * slack) - 1)


@kernel
def _zero_key(slack: float) -> Any:
    """Products of this size or less may be of an exact zero."""
    return np.int16(_key(slack * np.float32(1.01)) + 1)


@kernel
def _value(key: Any) -> Any:
    bits = np.int32(key ^ ((key >> 15) & np.int16(0x7FFF))) << 16
    return np.int32(bits).view(np.float32)


@kernel
def _key(value: Any) -> Any:
    key = np.int16(np.float32(value).view(np.int32) >> 16)
    return np.int16(key ^ ((key >> 15) & np.int16(0x7FFF)))


@kernel
def _groups_for(k: int) -> int:
    width = 128
    while width < 2 * k:
        width *= 2
    return width
