"""What codes leave over: the error after every level, and the distances to all codes of the last one."""
# N items, R rows, D dims, L levels, K codes of the last level

from __future__ import annotations

import numpy as np

from prerank_tools.quantizers.codebook import Quantizer
from prerank_tools.quantizers.rkmeans import RKMeans

BLOCK = 2_048


def level_errors(quantizer: Quantizer, x_ND: np.ndarray, codes_NL: np.ndarray) -> np.ndarray:
    """Squared error (N, L) float32 after each level; the whole error at each where levels do not add up."""
    error_NL = np.empty(codes_NL.shape, dtype=np.float32)
    levels = _additive(quantizer)
    for start in range(0, len(x_ND), BLOCK):
        codes_nL, error_nL = codes_NL[start : start + BLOCK], error_NL[start : start + BLOCK]
        r_nD = np.array(prepared(quantizer, x_ND[start : start + BLOCK]), dtype=np.float32)
        if levels is None:
            error_nL[:] = _square(r_nD - quantizer.decode(codes_nL))[:, None]
            continue
        for level, codebook_KD in enumerate(levels):
            r_nD -= codebook_KD[codes_nL[:, level]]
            error_nL[:, level] = _square(r_nD)
    return error_NL


def last_distances(quantizer: Quantizer, x_RD: np.ndarray, codes_RL: np.ndarray) -> np.ndarray:
    """Squared distances (R, K) float32 to every code of the last level, under each row's own prefix."""
    x_RD = np.asarray(prepared(quantizer, x_RD), dtype=np.float32)
    levels = _additive(quantizer)
    size = quantizer.sizes[-1]
    if levels is not None:
        for level, codebook_KD in enumerate(levels[:-1]):
            x_RD = x_RD - codebook_KD[codes_RL[:, level]]
        product_RK = x_RD @ levels[-1].T
        return np.maximum(_square(x_RD)[:, None] + _square(levels[-1]) - 2.0 * product_RK, 0.0)
    distance_RK = np.empty((len(x_RD), size), dtype=np.float32)
    codes_RL = codes_RL.copy()
    for code in range(size):
        codes_RL[:, -1] = code
        distance_RK[:, code] = _square(x_RD - quantizer.decode(codes_RL))
    return distance_RK


def prepared(quantizer: Quantizer, x_ND: np.ndarray) -> np.ndarray:
    """The vectors as the quantizer sees them."""
    return quantizer.prepared(x_ND) if isinstance(quantizer, RKMeans) else x_ND


def comparable(quantizer: Quantizer, x_ND: np.ndarray) -> np.ndarray:
    """The vectors (N, D) float32 that `decode` comes back to: normalised where the quantizer normalises."""
    return prepared(quantizer, x_ND)[:, : quantizer.width].astype(np.float32, copy=False)


def _additive(quantizer: Quantizer) -> tuple[np.ndarray, ...] | None:
    """The codebooks where decoding is their plain sum."""
    plain = isinstance(quantizer, RKMeans) and not quantizer.residual_norm
    return quantizer.codebooks if plain else None  # type: ignore[attr-defined]


def _square(x_ND: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", x_ND, x_ND)
