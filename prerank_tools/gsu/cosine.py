"""The exact cosine: float64, summed in one fixed order, so that every back end gives the same bits."""
# P pairs, N rows, D dims, L = 16 lanes

from __future__ import annotations

import numpy as np

LANES = 16


def exact_cosines(x_PD: np.ndarray, y_PD: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows in float64 (P,); 0 where a vector is zero, missing or not finite.

    Values are taken as stored (float32, float16, int8; a scale per row cancels). The order of summation
    is ours: dimension d goes to lane d % 16, lanes are added pairwise; no back end, thread count or batch
    changes a bit.
    """
    inverse_x, inverse_y = inverse_norms(x_PD), inverse_norms(y_PD)
    with np.errstate(invalid="ignore", over="ignore"):
        cosines_P = (lane_dots(x_PD, y_PD) * inverse_y) * inverse_x
    return np.where((inverse_x > 0) & (inverse_y > 0), cosines_P, 0.0)


def inverse_norms(x_ND: np.ndarray) -> np.ndarray:
    """1 / |x| in float64 (N,); 0 for a zero or non-finite vector, which is told as missing by it."""
    with np.errstate(invalid="ignore", over="ignore"):
        squares_N = lane_dots(x_ND, x_ND)
    usable_N = np.isfinite(squares_N) & (squares_N > 0)
    return np.where(usable_N, 1.0 / np.sqrt(np.where(usable_N, squares_N, 1.0)), 0.0)


def lane_dots(x_PD: np.ndarray, y_PD: np.ndarray) -> np.ndarray:
    """Dot product of each pair of rows in float64, in the fixed order; shapes broadcast."""
    x_PL = _lanes(x_PD)
    y_PL = _lanes(y_PD)
    sums = x_PL[..., 0, :] * y_PL[..., 0, :]
    for step in range(1, x_PL.shape[-2]):
        sums = sums + x_PL[..., step, :] * y_PL[..., step, :]
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def pad_lanes(x_ND: np.ndarray) -> np.ndarray:
    """The same rows, zero-padded to a multiple of 16 dims and contiguous; no copy where they already are."""
    missing = -x_ND.shape[-1] % LANES
    if missing:
        x_ND = np.pad(x_ND, ((0, 0), (0, missing)))
    return np.ascontiguousarray(x_ND)


def _lanes(x_ND: np.ndarray) -> np.ndarray:
    x_ND = np.asarray(x_ND, dtype=np.float64)
    missing = -x_ND.shape[-1] % LANES
    if missing:
        x_ND = np.concatenate([x_ND, np.zeros((*x_ND.shape[:-1], missing))], axis=-1)
    return x_ND.reshape(*x_ND.shape[:-1], x_ND.shape[-1] // LANES, LANES)
