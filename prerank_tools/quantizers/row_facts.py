"""What a row's codes leave over, its hash and its length, in one pass while the row is in the cache."""
# N rows (n of a block), D dims, L levels, M codes of all levels, W 8-byte words of a row

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from prerank_tools.quantizers.codebook import Quantizer
from prerank_tools.quantizers.duplicates import HASH_CHUNK, hash_weights, row_hashes
from prerank_tools.quantizers.residuals import level_errors, prepared
from prerank_tools.quantizers.rkmeans import RKMeans

FAST = {"reassoc", "contract", "nsz"}  # the sums are for reports: their last bits do not matter


def row_facts(
    quantizer: Quantizer, x_ND: np.ndarray, codes_NL: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """(squared error after each level (N, L) float32, 64-bit hash (N,), summed squares of all values).

    As `level_errors` and `row_hashes` give them; the squares are those of the vectors as quantized.
    """
    plain = isinstance(quantizer, RKMeans) and not quantizer.residual_norm and quantizer.normalize == "none"
    if not plain or x_ND.dtype.itemsize * x_ND.shape[1] % 8:
        wide_ND = prepared(quantizer, x_ND).astype(np.float32, copy=False)
        square = float(np.einsum("nd,nd->", wide_ND, wide_ND, dtype=np.float64))
        return level_errors(quantizer, x_ND, codes_NL), row_hashes(x_ND), square
    return _in_one_pass(quantizer.codebooks, x_ND, codes_NL)  # type: ignore[attr-defined]


def _in_one_pass(
    codebooks: tuple[np.ndarray, ...], x_ND: np.ndarray, codes_NL: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    flat_MD = np.ascontiguousarray(np.concatenate(codebooks), dtype=np.float32)
    start_L = np.cumsum([0, *map(len, codebooks[:-1])])
    error_NL = np.empty(codes_NL.shape, dtype=np.float32)
    hash_N = np.empty(len(x_ND), dtype=np.uint64)
    weight_W = hash_weights(x_ND.dtype.itemsize * x_ND.shape[1] // 8)
    square = 0.0
    for start in range(0, len(x_ND), HASH_CHUNK):
        rows = slice(start, start + HASH_CHUNK)
        x_nD = np.ascontiguousarray(x_ND[rows])
        wide_nD = x_nD.astype(np.float32, copy=False)
        word_nW = x_nD.view(np.uint64)
        square += _block(
            wide_nD, word_nW, weight_W, flat_MD, codes_NL[rows] + start_L, error_NL[rows], hash_N[rows]
        )
    return error_NL, hash_N, square


def _jit(function: Callable[..., Any]) -> Any:
    """Compile without the GIL and remember the machine code where a cache folder can be written."""
    options: dict[str, Any] = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # read-only site-packages and no home folder
        return numba.njit(**options)(function)


@_jit
def _block(
    x_nD: np.ndarray,
    word_nW: np.ndarray,
    weight_W: np.ndarray,
    flat_MD: np.ndarray,
    row_nL: np.ndarray,
    error_nL: np.ndarray,
    hash_n: np.ndarray,
) -> float:
    r_D = np.empty(x_nD.shape[1], dtype=np.float32)
    total = 0.0
    for n in range(len(x_nD)):
        mixed = np.uint64(0)
        for w in range(len(weight_W)):
            word = word_nW[n, w]
            mixed += ((word >> np.uint64(29)) ^ word) * weight_W[w]
        hash_n[n] = mixed
        square = np.float32(0.0)
        for d in range(len(r_D)):
            r_D[d] = x_nD[n, d]
            square += r_D[d] * r_D[d]
        total += np.float64(square)
        for level in range(row_nL.shape[1]):
            c_D = flat_MD[row_nL[n, level]]
            error = np.float32(0.0)
            for d in range(len(r_D)):
                r_D[d] -= c_D[d]
                error += r_D[d] * r_D[d]
            error_nL[n, level] = error
    return total
