"""Exact residual assignment on a GPU: guesses by a float16 product, near ties settled in float64."""
# N items (n in a block), D dims, L levels, K codes of a level

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch

from prerank_tools.quantizers.assign_levels import (
    MANY,
    Guessed,
    Levels,
    Rows,
    bounds,
    has_triton,
    held_levels,
)
from prerank_tools.quantizers.assign_settle import settle

BLOCK = 1 << 21  # rows on the device at once
SCORE_CELLS = 1 << 28  # scores held at once by the path without a kernel
# Finds one level's codes and doubts from `rows`, whose operand stands for the residual before level `first`.
Nearest = Callable[[Rows, Levels, int, int], None]


def assign_torch(x_ND: np.ndarray, codebooks: Sequence[np.ndarray], *, device: str = "cuda") -> np.ndarray:
    """Codes (N, L) uint16, equal to `assign_exact`; `x_ND` float32, float16 or int8 on the host."""
    levels = held_levels(codebooks, device)
    codes_NL = np.empty((len(x_ND), len(codebooks)), dtype=np.uint16)
    for start in range(0, len(x_ND), BLOCK):
        x_nD = _borrowed(x_ND[start : start + BLOCK]).to(device)
        codes_NL[start : start + BLOCK] = assign_on_device(x_nD, levels).cpu().numpy().astype(np.uint16)
    return codes_NL


def _borrowed(x_nD: np.ndarray) -> torch.Tensor:
    """The rows as a tensor, not copied; torch warns of read-only ones, which nobody writes to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(x_nD))


def assign_on_device(x_nD: torch.Tensor, levels: Levels, *, nearest: Nearest | None = None) -> torch.Tensor:
    """Codes (n, L) int32 of vectors that lie on the device, in any float type or int8."""
    if nearest is None and x_nD.is_cuda:
        from prerank_tools.quantizers import assign_hopper

        if assign_hopper.fits(x_nD, levels):
            return assign_hopper.assign_hopper(x_nD, levels)
    guessed = guess(x_nD, levels, nearest or best_nearest(levels))
    settle(x_nD, guessed, levels)
    return guessed.codes_nL


def guess(x_nD: torch.Tensor, levels: Levels, nearest: Nearest) -> Guessed:
    """Every level's code by the float16 product alone, with its runner-up and doubts."""
    space = torch.zeros(2, len(x_nD), levels.shape[0], dtype=torch.int32, device=x_nD.device)
    guessed = Guessed(space[0], space[1], torch.zeros(len(x_nD), dtype=torch.int32, device=x_nD.device))
    rows = _rows(x_nD, levels, guessed, 0)
    for level in range(levels.shape[0]):
        if levels.wide and level:
            rows = _rows(x_nD, levels, guessed, level)
        nearest(rows, levels, level, level if levels.wide else 0)
    return guessed


def _rows(x_nD: torch.Tensor, levels: Levels, guessed: Guessed, level: int) -> Rows:
    """The operand of a level: x, or what the levels above it left of x."""
    if x_nD.dtype in (torch.float16, torch.int8) and level == 0 and levels.scale == 1.0:
        half_nD = x_nD.half().contiguous()
        length_n = _lengths(half_nD, levels) * 1.001
        return Rows(half_nD, None, length_n, length_n.square(), guessed)
    if has_triton(levels):
        from prerank_tools.quantizers.assign_triton import residual_triton

        return residual_triton(x_nD, guessed, levels, level)
    r_nD = x_nD.float() * levels.scale
    for earlier in range(level):
        at_n = guessed.codes_nL[:, earlier].long()
        r_nD -= levels.plain_LKD[earlier][at_n] * levels.scale
    half_nD = r_nD.half()
    length_n = torch.linalg.vector_norm(r_nD, dim=1)
    lost_n = torch.linalg.vector_norm(r_nD - half_nD.float(), dim=1) * 1.001
    lost_n += 2.0**-22 * (level + 1) * (length_n + sum(levels.largest[:level]))
    length_n = length_n * 1.001 + lost_n
    return Rows(half_nD, lost_n, length_n, length_n.square(), guessed)


def _lengths(half_nD: torch.Tensor, levels: Levels) -> torch.Tensor:
    if has_triton(levels):
        from prerank_tools.quantizers.assign_triton import lengths_triton

        return lengths_triton(half_nD)
    return torch.linalg.vector_norm(half_nD, dim=1, dtype=torch.float32)


def best_nearest(levels: Levels) -> Nearest:
    """The fused kernel where Triton can run it, else plain torch."""
    if has_triton(levels):
        from prerank_tools.quantizers.assign_triton import nearest_triton

        return nearest_triton
    return nearest_torch


def nearest_torch(rows: Rows, levels: Levels, level: int, first: int) -> None:
    """One level without a kernel: scores in memory, their three least."""
    step = max(1, SCORE_CELLS // levels.shape[1])
    for start in range(0, len(rows.half_nD), step):
        _nearest_block(rows, slice(start, start + step), levels, level, first)


def _nearest_block(rows: Rows, at: slice, levels: Levels, level: int, first: int) -> None:
    guessed = rows.guessed
    score_nK = levels.norm_LK[level] + rows.half_nD[at].float() @ levels.half_LKD[level].float().T
    for earlier in range(first, level):
        score_nK += levels.table_LLKK[level, earlier][guessed.codes_nL[at, earlier].long()]
    three_n3, code_n3 = score_nK.topk(3, largest=False)
    a, b, c = bounds(level, levels)
    error_n = a * rows.square_n[at].sqrt() + b * rows.length_n[at] + 1e-12
    if rows.lost_n is not None:
        error_n += c * rows.lost_n[at]
    guessed.codes_nL[at, level], guessed.runner_nL[at, level] = code_n3[:, 0].int(), code_n3[:, 1].int()
    # Written so that NaN, from rows beyond the range of float16, is a doubt.
    near_n2 = (~(three_n3[:, 1:] - three_n3[:, :1] > 2.0 * error_n[:, None])).int()
    guessed.doubt_n[at] |= near_n2[:, 0] << level | near_n2[:, 1] << (level + MANY)
    rows.square_n[at] = (rows.square_n[at] * (1 + 2.0**-20) + three_n3[:, 0] + error_n).clamp(min=0.0)
