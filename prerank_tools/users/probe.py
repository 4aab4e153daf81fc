"""A linear probe (ours): can the next basket's items be read off frozen user vectors by one linear map?

The published system has no retrieval metric. Here HR@10 goes by a ridge regression from the frozen vector
to the mean embedding of the next basket, fitted on other users than it is judged on.
"""

# S samples (one a user), D vector dims, E item dims, I items

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def crossfit_hits(
    x_SD: np.ndarray,
    item_IE: np.ndarray,
    bought: Sequence[np.ndarray],
    *,
    k: int = 10,
    folds: int = 5,
    ridge: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """True for each sample whose top `k` items hold one of `bought`; no sample is judged by a map it is in.

    Items are scored by the cosine with the predicted vector, both centred on the mean of the items.
    """
    unit_IE = unit(item_IE - item_IE.mean(axis=0))
    target_SE = np.stack([unit_IE[items].mean(axis=0) for items in bought])
    fold_S = np.random.default_rng(seed).permutation(len(x_SD)) % folds
    hit_S = np.zeros(len(x_SD), dtype=bool)
    for fold in range(min(folds, len(x_SD))):
        held = fold_S == fold
        predict = fit(x_SD[~held], target_SE[~held], ridge=ridge)
        hit_S[held] = hits(
            predict(x_SD[held]) @ unit_IE.T, [bought[int(i)] for i in np.flatnonzero(held)], k=k
        )
    return hit_S


class LinearMap:
    """A ridge regression on standardised inputs, with a free intercept."""

    def __init__(
        self, mean_D: np.ndarray, scale_D: np.ndarray, weight_DE: np.ndarray, bias_E: np.ndarray
    ) -> None:
        self.mean_D, self.scale_D, self.weight_DE, self.bias_E = mean_D, scale_D, weight_DE, bias_E

    def __call__(self, x_SD: np.ndarray) -> np.ndarray:
        return ((x_SD - self.mean_D) / self.scale_D) @ self.weight_DE + self.bias_E


def fit(x_SD: np.ndarray, y_SE: np.ndarray, *, ridge: float) -> LinearMap:
    """Ridge regression in closed form; the penalty is `ridge` times the number of samples (float64)."""
    x, y = x_SD.astype(np.float64), y_SE.astype(np.float64)
    mean_D, scale_D = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-12)
    z = (x - mean_D) / scale_D
    gram_DD = z.T @ z + ridge * len(z) * np.eye(z.shape[1])
    return LinearMap(mean_D, scale_D, np.linalg.solve(gram_DD, z.T @ (y - y.mean(axis=0))), y.mean(axis=0))


def hits(score_SI: np.ndarray, bought: Sequence[np.ndarray], *, k: int = 10) -> np.ndarray:
    """Whether one of the bought items is among the top `k`; ties go to the lower place in the catalogue."""
    top_SK = np.argsort(-score_SI, axis=1, kind="stable")[:, :k]
    return np.array(
        [np.isin(top, items).any() for top, items in zip(top_SK, bought, strict=True)], dtype=bool
    )


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows at length one; a zero row stays zero."""
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)
