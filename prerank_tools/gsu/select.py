"""Shortlists of the top K from blocks of bf16 products: thresholds that cut no winner.

With t the K-th largest product and every product within `slack` of the true cosine, a behaviour below
t - rounding(t) - 2 slack cannot be among the K best. Products lie behaviour by behaviour, so that 32
candidates pass each step together, and are compared as int16 views of their bf16 bits, made monotone.
"""
# C candidates (B of a vector of 32), n behaviours of a chunk, B capacity, K kept, G groups of behaviours

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from prerank_tools.bits import lowest_bit, set_bits
from prerank_tools.compiled import kernel
from prerank_tools.gsu.simd import at_least_32, count_32, reaching_32, take_in_32

LOWEST = np.int16(-32768)
HIDDEN = LOWEST  # the key of a behaviour that a candidate does not see; no product has it
HIGHEST = np.int16(32767)  # no product reaches it
WIDE = 32  # candidates of a vector


class Shortlists(NamedTuple):
    """Positions and products that can still win; `size_C` is -1 where they did not fit.

    `low_C` is the running threshold, `slack_C` how far a product can be from its cosine.
    """

    low_C: np.ndarray
    slack_C: np.ndarray
    size_C: np.ndarray
    ids_CB: np.ndarray
    kept_CB: np.ndarray


@kernel
def absorb(keys_nC: np.ndarray, start: int, visible_C: np.ndarray, k: int, lists: Shortlists) -> None:
    """Add what can win among behaviours `start ..` to the shortlists; rows past the history are not read."""
    asked, width = len(visible_C), keys_nC.shape[1]
    seen_1C = np.zeros((1, width), dtype=np.int16)
    for c in range(asked):
        seen_1C[0, c] = min(max(visible_C[c] - start, 0), HIGHEST)
    maxima_GC = _take_in(keys_nC, seen_1C, k)
    low_1C = np.full((1, width), HIGHEST, dtype=np.int16)
    for first in range(0, asked, WIDE):
        _raise(keys_nC, maxima_GC, first, min(first + WIDE, asked), k, lists)
    for c in range(asked):
        low_1C[0, c] = max(lists.low_C[c], HIDDEN + 1) if lists.size_C[c] >= 0 else HIGHEST
    _collect(keys_nC, start, low_1C, k, lists)


@kernel(inlined=True)
def cut(lists: Shortlists, c: int, size: int, k: int) -> Any:
    """The threshold that list `c` itself gives, at least its running one."""
    whole = (size + 31) // 32 * 32
    for b in range(size, whole):
        lists.kept_CB[c, b] = LOWEST
    kth = _kth_listed(lists.kept_CB, c, whole, k)
    low, zero = _below(kth, lists.slack_C[c]), _zero_key(lists.slack_C[c])
    if low <= zero:  # what may be an exact zero does not count among the K
        zeros = _count_listed(lists.kept_CB, c, whole, np.int16(-zero - 1))
        zeros -= _count_listed(lists.kept_CB, c, whole, np.int16(zero + 1))
        low = _below(_kth_listed(lists.kept_CB, c, whole, k + zeros), lists.slack_C[c])
    return max(low, lists.low_C[c])


# A behaviour belongs to group (position mod G). The K-th largest of the groups' maxima is reached by at least
# K behaviours, and by few more because G is well above K: it costs one vector maximum a behaviour.
@kernel
def _take_in(keys_nC: np.ndarray, seen_1C: np.ndarray, k: int) -> np.ndarray:
    """Make the keys monotone, HIDDEN where a candidate sees no behaviour; maxima of groups (G, C)."""
    groups = 128
    while groups < 2 * k:
        groups *= 2
    maxima_GC = np.full((groups, keys_nC.shape[1]), LOWEST, dtype=np.int16)
    for i in range(keys_nC.shape[0]):
        for at in range(0, keys_nC.shape[1], WIDE):
            take_in_32(keys_nC, i, at, seen_1C, maxima_GC, i % groups)
    return maxima_GC


@kernel
def _raise(
    keys_nC: np.ndarray, maxima_GC: np.ndarray, first: int, last: int, k: int, lists: Shortlists
) -> None:
    """Raise the thresholds of up to 32 candidates, if one of them has no clear one yet."""
    settled = True
    for c in range(first, last):
        settled &= lists.low_C[c] > _zero_key(lists.slack_C[c])
    if settled:
        return
    want_1B = np.full((1, WIDE), k, dtype=np.int16)
    kth_1B = _kth_largest(maxima_GC, first, want_1B)
    clear = True
    for c in range(first, last):
        clear &= _below(kth_1B[0, c - first], lists.slack_C[c]) > _zero_key(lists.slack_C[c])
    if not clear:
        kth_1B = _kth_beside_zeros(keys_nC, first, last, want_1B, lists)
    for c in range(first, last):
        lists.low_C[c] = max(lists.low_C[c], _below(kth_1B[0, c - first], lists.slack_C[c]))


@kernel
def _kth_beside_zeros(
    keys_nC: np.ndarray, first: int, last: int, want_1B: np.ndarray, lists: Shortlists
) -> np.ndarray:
    """The K-th largest of all keys; where it is not clear of zero, of those that cannot be exact zeros."""
    kth_1B, zero_1B = _kth_largest(keys_nC, first, want_1B), np.zeros((1, WIDE), dtype=np.int16)
    for c in range(first, last):
        zero_1B[0, c - first] = _zero_key(lists.slack_C[c])
    above_1B, from_1B = np.empty_like(zero_1B), np.empty_like(zero_1B)
    count_32(keys_nC, first, zero_1B + np.int16(1), above_1B)
    count_32(keys_nC, first, -zero_1B - np.int16(1), from_1B)
    for c in range(first, last):
        if _below(kth_1B[0, c - first], lists.slack_C[c]) <= zero_1B[0, c - first]:
            want_1B[0, c - first] += from_1B[0, c - first] - above_1B[0, c - first]
    return _kth_largest(keys_nC, first, want_1B)


@kernel
def _kth_largest(keys_nC: np.ndarray, at: int, want_1B: np.ndarray) -> np.ndarray:
    """Of 32 candidates each the largest key that `want_1B` of its keys reach, LOWEST if there are fewer."""
    low_1B = np.full((1, WIDE), LOWEST, dtype=np.int16)
    trial_1B, count_1B = np.empty((1, WIDE), dtype=np.int16), np.empty((1, WIDE), dtype=np.int16)
    for bit in range(15, -1, -1):
        for j in range(WIDE):
            trial_1B[0, j] = low_1B[0, j] + (1 << bit)
        count_32(keys_nC, at, trial_1B, count_1B)
        for j in range(WIDE):
            if count_1B[0, j] >= want_1B[0, j]:
                low_1B[0, j] = trial_1B[0, j]
    return low_1B


@kernel
def _collect(keys_nC: np.ndarray, start: int, low_1C: np.ndarray, k: int, lists: Shortlists) -> None:
    # Two behaviours at a time: the branch on whether there is anything left costs more than the bits.
    for i in range(0, keys_nC.shape[0], 2):
        for at in range(0, keys_nC.shape[1], WIDE):
            bits = reaching_32(keys_nC, i, at, low_1C) | reaching_32(keys_nC, i + 1, at, low_1C) << 32
            while bits:
                bit = lowest_bit(bits)
                bits &= bits - 1
                row, c = i + (bit >> 5), at + (bit & 31)
                _append(lists, c, start + row, keys_nC[row, c])
                if lists.size_C[c] == lists.ids_CB.shape[1]:
                    low_1C[0, c] = _compact(lists, c, k)


@kernel(inlined=True)
def _append(lists: Shortlists, c: int, position: int, key: Any) -> None:
    size = lists.size_C[c]
    lists.ids_CB[c, size] = position
    lists.kept_CB[c, size] = key
    lists.size_C[c] = size + 1


@kernel
def _compact(lists: Shortlists, c: int, k: int) -> Any:
    """Drop what can win no longer from a full list; its threshold, which none reaches if it stays full."""
    size, left = lists.size_C[c], 0
    lists.low_C[c] = cut(lists, c, size, k)
    for b in range(size):
        if lists.kept_CB[c, b] >= lists.low_C[c]:
            lists.ids_CB[c, left] = lists.ids_CB[c, b]
            lists.kept_CB[c, left] = lists.kept_CB[c, b]
            left += 1
    lists.size_C[c] = left if left < size else -1
    return max(lists.low_C[c], HIDDEN + 1) if left < size else HIGHEST


@kernel(inlined=True)
def _kth_listed(kept_CB: np.ndarray, c: int, size: int, k: int) -> Any:
    """The K-th largest of the first keys of list `c`, or LOWEST if there are fewer."""
    low, high = np.int64(LOWEST), np.int64(0x4000)  # products of unit rows are below 2.0
    while high - low > 1:
        middle = (low + high) >> 1
        if _count_listed(kept_CB, c, size, np.int16(middle)) >= k:
            low = middle
        else:
            high = middle
    return np.int16(low)


@kernel(inlined=True)
def _count_listed(kept_CB: np.ndarray, c: int, size: int, low: Any) -> int:
    total = 0
    for block in range(0, size, 32):
        total += set_bits(at_least_32(kept_CB, c, block, low))
    return total


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
