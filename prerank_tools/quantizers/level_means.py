"""Decode foreign SIDs: where their codebook is unknown, a code stands for the mean residual of its items."""

# N items, L levels, K codes of a level, D dims
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prerank_tools.quantizers.assign import decode


@dataclass(frozen=True)
class LevelMeans:
    """What `decode` needs of a quantizer, learned from codes and vectors."""

    codebooks: tuple[np.ndarray, ...]

    def decode(self, codes_NL: np.ndarray) -> np.ndarray:
        """Vectors (N, D) float32 of codes."""
        return decode(codes_NL, self.codebooks)


def fit_level_means(
    blocks: Callable[[], Iterable[np.ndarray]], codes_NL: np.ndarray, sizes: Sequence[int]
) -> LevelMeans:
    """The best additive decoder level by level (ours): one pass over the blocks of vectors a level.

    Of RQ-KMeans codes it returns the centroids, up to k-means' own convergence.
    """
    codebooks: tuple[np.ndarray, ...] = ()
    for level, size in enumerate(sizes):
        start, sum_KD = 0, torch.zeros(0)
        for x_ND in blocks():
            code_NL = codes_NL[start : start + len(x_ND)]
            residual_ND = x_ND - decode(code_NL[:, :level], codebooks) if level else x_ND
            if not len(sum_KD):
                sum_KD = torch.zeros(size, x_ND.shape[1], dtype=torch.float64)
            code_N = torch.from_numpy(code_NL[:, level].astype(np.int64))
            sum_KD.index_add_(0, code_N, torch.from_numpy(residual_ND.astype(np.float64)))
            start += len(x_ND)
        count_K = np.bincount(codes_NL[:, level], minlength=size)
        codebooks += ((sum_KD.numpy() / np.maximum(count_K, 1)[:, None]).astype(np.float32),)
    return LevelMeans(codebooks)
