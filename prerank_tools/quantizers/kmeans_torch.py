"""Lloyd's k-means on a GPU, repeatable: sums are products with one-hot rows, never atomic additions."""
# N rows (n in a block), D dims, K centroids

from __future__ import annotations

import numpy as np
import torch

POINTS_PER_CODE = 256  # as faiss: more rows do not move the centroids
CELLS = 1 << 27  # distances held at once
SPLIT = 1.0 / 1_024  # faiss' shift of the two halves of a split cluster


def kmeans_torch(
    x_ND: np.ndarray | torch.Tensor, size: int, *, iterations: int, seed: int, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """(centroids_KD float32, nearest centroid of every row int64), from seeded random rows.

    As faiss: at most 256 rows a centroid are used, an empty centroid takes half of the largest cluster.
    """
    x = torch.as_tensor(x_ND).to(device).float()
    rng = np.random.default_rng(seed)
    kept = rng.permutation(len(x))[: POINTS_PER_CODE * size]
    sample = x[torch.from_numpy(np.sort(kept)).to(device)]
    start = torch.from_numpy(rng.choice(len(sample), size, replace=False)).to(device)
    c_KD = sample[start].clone()
    for _ in range(iterations):
        c_KD = _step(sample, c_KD)
    code_N = torch.cat([_nearest(block, c_KD) for block in x.split(_rows(size))])
    return c_KD.cpu().numpy(), code_N.cpu().numpy()


def _step(x_ND: torch.Tensor, c_KD: torch.Tensor) -> torch.Tensor:
    sum_KD = torch.zeros_like(c_KD)
    count_K = torch.zeros(len(c_KD), device=c_KD.device)
    for x_nD in x_ND.split(_rows(len(c_KD))):
        hot_nK = torch.nn.functional.one_hot(_nearest(x_nD, c_KD), len(c_KD)).float()
        sum_KD += hot_nK.T @ x_nD
        count_K += hot_nK.sum(0)
    c_KD = torch.where(count_K[:, None] > 0, sum_KD / count_K.clamp(min=1)[:, None], c_KD)
    return _split_largest(c_KD, count_K)


def _split_largest(c_KD: torch.Tensor, count_K: torch.Tensor) -> torch.Tensor:
    """Each empty centroid becomes a copy of the largest cluster's, both shifted apart a little."""
    sign_D = torch.where(torch.arange(c_KD.shape[1], device=c_KD.device) % 2 == 0, SPLIT, -SPLIT)
    for empty in (count_K == 0).nonzero()[:, 0].tolist():
        largest = int(count_K.argmax())
        c_KD[empty] = c_KD[largest] * (1 + sign_D)
        c_KD[largest] = c_KD[largest] * (1 - sign_D)
        count_K[empty] = count_K[largest] / 2
        count_K[largest] = count_K[largest] / 2
    return c_KD


def _nearest(x_nD: torch.Tensor, c_KD: torch.Tensor) -> torch.Tensor:
    return (c_KD.square().sum(1) - 2.0 * x_nD @ c_KD.T).argmin(1)


def _rows(size: int) -> int:
    return max(256, CELLS // size)
