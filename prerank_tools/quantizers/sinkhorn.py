"""Balanced assignment by Sinkhorn in the log domain: finite at any eps, in float32 and bfloat16."""

# B samples, K codes
from __future__ import annotations

import math

import torch


def sinkhorn(cost_BK: torch.Tensor, *, eps: float, iterations: int, rows_first: bool = True) -> torch.Tensor:
    """Log transport plan (..., B, K) of exp(-cost / eps) with rows summing to 1/B and columns to 1/K.

    Public code exponentiates first and is NaN from eps 1e-3 down; here only differences are exponentiated.
    bfloat16 costs are scaled in float32, since eps 1e-4 multiplies their rounding by 1e4.
    """
    log_BK = -cost_BK.float() / eps if cost_BK.dtype != torch.float64 else -cost_BK / eps
    order = (-1, -2) if rows_first else (-2, -1)
    for _ in range(iterations):
        for dim in order:
            log_BK = log_BK - torch.logsumexp(log_BK, dim=dim, keepdim=True)
    return log_BK - math.log(cost_BK.shape[order[0]])


def sinkhorn_lcrec(d_BK: torch.Tensor, *, eps: float = 0.003, iterations: int = 50) -> torch.Tensor:
    """LC-Rec: distances centred to [-1, 1] in the batch, rows then columns; the log plan (..., B, K)."""
    high = d_BK.amax(dim=(-2, -1), keepdim=True)
    middle = (high + d_BK.amin(dim=(-2, -1), keepdim=True)) / 2
    return sinkhorn((d_BK - middle) / (high - middle + 1e-5), eps=eps, iterations=iterations)


def sinkhorn_forge(d_BK: torch.Tensor, *, eps: float = 0.1, iterations: int = 5) -> torch.Tensor:
    """FORGE, in training only: distances standardised in the batch and shifted to 0, columns then rows.

    Returns the log plan (B, K); its row-wise argmax is the balanced code.
    """
    d_BK = d_BK.detach().float()
    cost_BK = (d_BK - d_BK.mean()) / (d_BK.std(correction=0) + 1e-6)
    return sinkhorn(cost_BK - cost_BK.min(), eps=eps, iterations=iterations, rows_first=False)
