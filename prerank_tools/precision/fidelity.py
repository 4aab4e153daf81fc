"""Fidelity: how much of a table's geometry a row format keeps, as cosines and as neighbours in common."""

# N rows, D dims, Q queries, K neighbours

from __future__ import annotations

import numpy as np


def cosines(x_ND: np.ndarray, y_ND: np.ndarray) -> np.ndarray:
    """Cosine of each row with its decoded row (float64); two zero rows agree, one zero row does not."""
    x, y = x_ND.astype(np.float64), y_ND.astype(np.float64)
    norms_N = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    both_zero_N = ~x.any(axis=1) & ~y.any(axis=1)
    dots_N = np.einsum("nd,nd->n", x, y)
    return np.where(both_zero_N, 1.0, dots_N / np.where(norms_N == 0, 1.0, norms_N))


def neighbour_overlap(
    x_ND: np.ndarray, y_ND: np.ndarray, *, k: int = 10, queries: int = 1000, seed: int = 0
) -> float:
    """Mean share of a row's exact top-k cosine neighbours that stay when every row is a decoded one.

    The row itself is left out. Queries are sampled with `seed`; fewer than two rows give 1.0.
    """
    if len(x_ND) < 2:
        return 1.0
    k = min(k, len(x_ND) - 1)
    rng = np.random.default_rng(seed)
    query_Q = np.sort(rng.choice(len(x_ND), size=min(queries, len(x_ND)), replace=False))
    before, after = _top(x_ND, query_Q, k), _top(y_ND, query_Q, k)
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(before, after, strict=True)]))


def _top(x_ND: np.ndarray, query_Q: np.ndarray, k: int) -> np.ndarray:
    x_ND = x_ND.astype(np.float32)
    x_ND = x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)
    top = [_top_of_block(x_ND, block, k) for block in np.array_split(query_Q, max(1, len(query_Q) // 256))]
    return np.concatenate(top)


def _top_of_block(x_ND: np.ndarray, query_B: np.ndarray, k: int) -> np.ndarray:
    similarity_BN = x_ND[query_B] @ x_ND.T
    similarity_BN[np.arange(len(query_B)), query_B] = -np.inf
    # A stable sort settles ties by row, so equal items do not count as lost neighbours.
    candidates = np.argpartition(-similarity_BN, k - 1, axis=1)[:, :k]
    kth_B = np.take_along_axis(similarity_BN, candidates, axis=1).min(axis=1)
    return np.stack([_first_by_row(row, kth, k) for row, kth in zip(similarity_BN, kth_B, strict=True)])


def _first_by_row(similarity_N: np.ndarray, kth: float, k: int) -> np.ndarray:
    above = np.flatnonzero(similarity_N > kth)
    return np.concatenate([above, np.flatnonzero(similarity_N == kth)[: k - len(above)]])
