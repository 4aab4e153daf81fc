"""A SID as one integer: mixed-radix keys that sort like the codes, and the runs of equal keys."""

# N items, L levels, G groups of items with the same key
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from prerank_tools.errors import ContractError

CHUNK = 1 << 18  # rows looked up at a time


def check_sizes(sizes: Sequence[int]) -> None:
    """Refuse level sizes whose SIDs do not fit a key: more than 63 bits."""
    if math.prod(int(size) for size in sizes) > 2**63 - 1:
        raise ContractError(
            f"level sizes {list(sizes)} need more than 63 bits", "use fewer levels or fewer codes a level"
        )


def pack_codes(codes_NL: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Mixed-radix int64 keys (N,): equal exactly where all codes are equal, ordered as the codes are.

    Raises ContractError where the level sizes need more than 63 bits or a code is outside its level.
    """
    codes_NL = np.asarray(codes_NL)
    if codes_NL.ndim != 2 or codes_NL.shape[1] != len(sizes):
        raise ContractError(
            f"codes have shape {codes_NL.shape}, expected (N, {len(sizes)})",
            "level sizes must be those of the codebook that gave the codes",
        )
    check_sizes(sizes)
    key_N = np.zeros(len(codes_NL), dtype=np.int64)
    for level, size in enumerate(sizes):
        code_N = codes_NL[:, level].astype(np.int64)
        if len(code_N) and not (code_N.min() >= 0 and code_N.max() < size):
            raise ContractError(
                f"level {level + 1} has codes {code_N.min()} to {code_N.max()}, its codebook has {size}",
                "are these SIDs from another codebook?",
            )
        key_N *= int(size)
        key_N += code_N
    return key_N


def unpack_codes(key_N: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The codes (N, L) int32 behind mixed-radix keys."""
    codes_NL = np.empty((len(key_N), len(sizes)), dtype=np.int32)
    rest_N = np.asarray(key_N, dtype=np.int64)
    for level in range(len(sizes) - 1, -1, -1):
        rest_N, codes_NL[:, level] = np.divmod(rest_N, int(sizes[level]))
    return codes_NL


def group_starts(sorted_N: np.ndarray) -> np.ndarray:
    """Where each run of equal values begins in a sorted array (G,)."""
    if not len(sorted_N):
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(np.concatenate(([True], sorted_N[1:] != sorted_N[:-1])))


def shared(value_N: np.ndarray) -> np.ndarray:
    """True where another row has the same value (N,); 8 bytes a row beside the values."""
    sorted_N = np.sort(value_N)
    again_M = np.unique(sorted_N[1:][sorted_N[1:] == sorted_N[:-1]])
    del sorted_N
    shared_N = np.zeros(len(value_N), dtype=bool)
    if not len(again_M):
        return shared_N
    for start in range(0, len(value_N), CHUNK):
        value_n = value_N[start : start + CHUNK]
        at_n = np.minimum(np.searchsorted(again_M, value_n), len(again_M) - 1)
        shared_N[start : start + CHUNK] = again_M[at_n] == value_n
    return shared_N


def order_by_key(key_N: np.ndarray, ids_N: np.ndarray) -> np.ndarray:
    """Row order by key, then by item id: the one order every collision policy works in."""
    by_id_N = np.argsort(ids_N, kind="stable")
    return np.asarray(by_id_N[np.argsort(key_N[by_id_N], kind="stable")])


def place_in_group(sorted_N: np.ndarray) -> np.ndarray:
    """Running index of every element within its run of equal values in a sorted array."""
    starts_G = group_starts(sorted_N)
    lengths_G = np.diff(starts_G, append=len(sorted_N))
    return np.arange(len(sorted_N), dtype=np.int64) - np.repeat(starts_G, lengths_G)
