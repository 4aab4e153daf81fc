"""Items with the same content: the collisions that no codebook can avoid, counted and listed."""

# N items, W 8-byte words of a row, M distinct contents
from __future__ import annotations

import numpy as np

from prerank_tools.quantizers.sid_keys import group_starts

CHUNK = 65_536
HASH_CHUNK = 512  # rows whose words stay in the cache


def content_groups(content_N: np.ndarray) -> np.ndarray:
    """For each row, the first row with the same content (N,) int64.

    `content_N` is a matrix of vectors (N, D), compared byte for byte, or one content hash a row (N,).
    """
    content_N = np.asarray(content_N)
    key_N = row_hashes(content_N) if content_N.ndim == 2 else content_N
    order_N = np.argsort(key_N, kind="stable")
    same_N = key_N[order_N][1:] == key_N[order_N][:-1]
    if content_N.ndim == 2:
        same_N[same_N] = _equal_neighbours(content_N, order_N, np.flatnonzero(same_N))
    run_N = np.concatenate(([0], np.cumsum(~same_N))) if len(order_N) else order_N
    first_N = np.empty(len(order_N), dtype=np.int64)
    first_N[order_N] = order_N[group_starts(run_N)][run_N]
    return first_N


def duplicate_floor(first_N: np.ndarray) -> float:
    """Collision rate of a quantizer that separates all that differs: 1 - distinct contents / items."""
    own = int((first_N == np.arange(len(first_N))).sum())  # every content is first met once
    return 1.0 - own / len(first_N) if len(first_N) else 0.0


def hash_floor(hash_N: np.ndarray) -> float:
    """The same of one content hash a row, without the groups: 8 bytes a row."""
    return 1.0 - len(group_starts(np.sort(hash_N))) / len(hash_N) if len(hash_N) else 0.0


def list_duplicates(first_N: np.ndarray, *, limit: int | None = None) -> list[np.ndarray]:
    """Rows of every group of equal contents, largest group first."""
    order_N = np.argsort(first_N, kind="stable")
    starts_M = group_starts(first_N[order_N])
    size_M = np.diff(starts_M, append=len(order_N))
    groups = [order_N[starts_M[m] : starts_M[m] + size_M[m]] for m in np.flatnonzero(size_M > 1)]
    return sorted(groups, key=lambda rows: (-len(rows), rows[0]))[:limit]


def row_hashes(x_ND: np.ndarray) -> np.ndarray:
    """A 64-bit hash a row; equal rows hash equal, and what else does is told apart by `_equal_neighbours`."""
    bytes_per_row = x_ND.dtype.itemsize * x_ND.shape[1]
    words = -(-bytes_per_row // 8)
    weight_W = hash_weights(words)
    hash_N = np.empty(len(x_ND), dtype=np.uint64)
    for start in range(0, len(x_ND), HASH_CHUNK):
        rows = np.ascontiguousarray(x_ND[start : start + HASH_CHUNK])
        byte_NB = rows.view(np.uint8).reshape(len(rows), bytes_per_row)
        if bytes_per_row % 8:
            byte_NB = np.pad(byte_NB, ((0, 0), (0, words * 8 - bytes_per_row)))
        word_NW = byte_NB.view(np.uint64)
        # Folding the high half down first: floats of round numbers differ in their high bits only.
        folded_NW = word_NW >> np.uint64(29)
        folded_NW ^= word_NW
        folded_NW *= weight_W
        hash_N[start : start + HASH_CHUNK] = folded_NW.sum(axis=1)
    return hash_N


def hash_weights(words: int) -> np.ndarray:
    """Odd multipliers (W,) uint64 of the words of a row."""
    drawn_W = np.random.default_rng(0).integers(1, 2**63, size=words, dtype=np.uint64)
    return np.asarray(drawn_W * np.uint64(2) + np.uint64(1))


def _equal_neighbours(x_ND: np.ndarray, order_N: np.ndarray, at_R: np.ndarray) -> np.ndarray:
    """Whether rows `order[at]` and `order[at + 1]` are equal byte for byte (R,)."""
    equal_R = np.empty(len(at_R), dtype=bool)
    for start in range(0, len(at_R), CHUNK):
        at = at_R[start : start + CHUNK]
        left = np.ascontiguousarray(x_ND[order_N[at]]).view(np.uint8)
        right = np.ascontiguousarray(x_ND[order_N[at + 1]]).view(np.uint8)
        equal_R[start : start + CHUNK] = (left == right).all(axis=1)
    return equal_R
