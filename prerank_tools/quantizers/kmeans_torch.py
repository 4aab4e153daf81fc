"""Lloyd's k-means on a GPU, repeatable: sums are products with one-hot rows, never atomic additions."""
# N rows (n in a block), D dims (P of them in a step), K centroids

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

POINTS_PER_CODE = 256  # as faiss: more rows do not move the centroids
CELLS = 1 << 27  # distances held at once
SPLIT = 1.0 / 1_024  # faiss' shift of the two halves of a split cluster
AXES_STEPS = 10  # faiss' number of growing sets of axes


def kmeans_torch(
    x_ND: np.ndarray | torch.Tensor,
    size: int,
    *,
    iterations: int,
    seed: int,
    device: str,
    init: Literal["random", "progressive"] = "random",
) -> tuple[np.ndarray, np.ndarray]:
    """(centroids_KD float32, nearest centroid of every row int64), from seeded random rows.

    As faiss: at most 256 rows a centroid are used, an empty centroid takes half of the largest cluster.
    `progressive` is its ProgressiveDimClustering: `iterations` on each of ever more principal axes.
    """
    x = torch.as_tensor(x_ND).to(device).float()
    rng = np.random.default_rng(seed)
    kept = rng.permutation(len(x))[: POINTS_PER_CODE * size]
    sample = x[torch.from_numpy(np.sort(kept)).to(device)]
    start = torch.from_numpy(rng.choice(len(sample), size, replace=False)).to(device)
    if init == "progressive":
        c_KD = _progressive(sample, start, iterations)
    else:
        c_KD = _lloyd(sample, sample[start], iterations)
    code_N = torch.cat([_nearest(block, c_KD) for block in x.split(_rows(size))])
    return c_KD.cpu().numpy(), code_N.cpu().numpy()


def axes_steps(dims: int) -> list[int]:
    """Numbers of leading axes, growing by one factor up to all: what faiss takes."""
    steps = min(AXES_STEPS, dims)
    return [dims if step == steps else int(dims ** (step / steps)) for step in range(1, steps + 1)]


def _progressive(x_ND: torch.Tensor, start_K: torch.Tensor, iterations: int) -> torch.Tensor:
    """Centroids from k-means on the first principal axes, then on more of them from where it ended."""
    mean_D = x_ND.mean(dim=0)
    # In float64, as axes of near equal spread turn with every rounding.
    _, axis_DD = torch.linalg.eigh(_covariance(x_ND - mean_D))
    axis_DD = axis_DD.flip(1).float()
    turned_ND = (x_ND - mean_D) @ axis_DD
    steps = axes_steps(x_ND.shape[1])
    c_KP = turned_ND[start_K, : steps[0]]
    for axes in steps:
        c_KP = torch.nn.functional.pad(c_KP, (0, axes - c_KP.shape[1]))
        c_KP = _lloyd(turned_ND[:, :axes].contiguous(), c_KP, iterations)
    return c_KP @ axis_DD.T + mean_D


def _covariance(centred_ND: torch.Tensor) -> torch.Tensor:
    """Sum of outer products (D, D) float64, by blocks: a float64 copy of all rows would not fit."""
    sum_DD = torch.zeros(
        centred_ND.shape[1], centred_ND.shape[1], dtype=torch.float64, device=centred_ND.device
    )
    for block_nD in centred_ND.split(_rows(centred_ND.shape[1])):
        wide_nD = block_nD.double()
        sum_DD += wide_nD.T @ wide_nD
    return sum_DD


def _lloyd(x_ND: torch.Tensor, c_KD: torch.Tensor, iterations: int) -> torch.Tensor:
    c_KD = c_KD.clone()
    for _ in range(iterations):
        c_KD = _step(x_ND, c_KD)
    return c_KD


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
