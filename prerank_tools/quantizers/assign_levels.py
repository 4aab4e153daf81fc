"""Codebooks on a device as the float16 products need them, and what a block of rows carries along."""
# N items (n in a block), D dims, L levels, K codes of a level

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from prerank_tools.quantizers.assign_hopper import Packed

TABLE_CODES = 1_024  # with wider levels, residuals are cheaper to read than code-by-code tables
MISSING = 1e30  # |c|^2 of a code that a smaller level lacks
MANY = 16  # offset of the doubt bits that say that more than two codes are near


@dataclass(frozen=True)
class Levels:
    """The codebooks on the device: exact, and as operands of a float16 product with the bounds of its error.

    Operands are scaled by a power of two into the range of float16. `table` holds 2 c_j.c' for each pair of
    an earlier level j and a later one: with the rounded c', the rounding of c meets the residual alone.
    """

    exact: tuple[torch.Tensor, ...]  # L of (K_l, D) float64, unscaled
    plain_LKD: torch.Tensor  # the same in float32, padded to one size
    scale: float
    half_LKD: torch.Tensor  # float16 of -2 c; codes that a smaller level lacks are zeros
    norm_LK: torch.Tensor  # float32 |c|^2
    table_LLKK: torch.Tensor  # float32 (level, earlier, K, K); empty where levels are wide
    rounding: tuple[float, ...]  # L, the largest |c - c'|
    largest: tuple[float, ...]  # L, the largest |c'|

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, K of the widest level, D)."""
        levels, size, dims = self.half_LKD.shape
        return levels, size, dims

    @cached_property
    def packed(self) -> Packed:
        """The codebooks as the kernel for Hopper cards reads them, laid out at its first use."""
        from prerank_tools.quantizers.assign_hopper import pack

        return pack(self)

    @property
    def wide(self) -> bool:
        """Whether each level starts from its residual instead of tables."""
        return self.half_LKD.shape[1] > TABLE_CODES


@dataclass(frozen=True)
class Guessed:
    """Codes by the float16 product alone, and how sure they are.

    Bit l of a doubt: at level l the runner-up may be nearer; bit 16 + l: another code may be.
    """

    codes_nL: torch.Tensor  # int32
    runner_nL: torch.Tensor  # int32
    doubt_n: torch.Tensor  # int32


@dataclass
class Rows:
    """What a block of rows carries from level to level; all on the device, in scaled units."""

    half_nD: torch.Tensor  # float16 operand
    lost_n: torch.Tensor | None  # bound on what float16 took from it; None where nothing
    length_n: torch.Tensor  # bound on its norm
    square_n: torch.Tensor  # bound on the squared norm of the residual at the level at hand
    guessed: Guessed


_HELD: dict[str, tuple[list[np.ndarray], Levels]] = {}  # the last codebooks of each device


def held_levels(codebooks: Sequence[np.ndarray], device: str) -> Levels:
    """Shards of one table come one by one: their codebooks are laid out once."""
    before, levels = _HELD.get(device, ([], None))
    if levels is None or len(before) != len(codebooks) or not all(map(np.array_equal, before, codebooks)):
        levels = put_levels(codebooks, device)
        _HELD[device] = [c_KD.copy() for c_KD in codebooks], levels
    return levels


def put_levels(codebooks: Sequence[np.ndarray], device: str) -> Levels:
    """Lay the codebooks out on the device; levels of fewer codes are padded to the widest."""
    count, dims = len(codebooks), codebooks[0].shape[1]
    size = max(16, 1 << (max(map(len, codebooks)) - 1).bit_length())
    exact = tuple(torch.from_numpy(c_KD.astype(np.float64)).to(device) for c_KD in codebooks)
    peak = max(float(c_KD.abs().max()) for c_KD in exact)
    near_one = peak == 0.0 or 2.0**-8 <= peak <= 2.0**8  # then float16 and int8 rows are operands as they are
    scale = 1.0 if near_one else float(2.0 ** -np.ceil(np.log2(peak)))
    half_LKD = torch.zeros(count, size, dims, dtype=torch.float16, device=device)
    norm_LK = torch.full((count, size), MISSING, device=device)
    for level, c_KD in enumerate(exact):
        half_LKD[level, : len(c_KD)] = (-2.0 * scale * c_KD).half()
        norm_LK[level, : len(c_KD)] = (scale * c_KD).square().sum(1).float()
    plain_LKD = torch.zeros(count, size, dims, device=device)
    for level, c_KD in enumerate(exact):
        plain_LKD[level, : len(c_KD)] = c_KD.float()
    rounded = [half_LKD[level, : len(c_KD)].double() / -2.0 for level, c_KD in enumerate(exact)]
    error = [float((c - scale * e).norm(dim=1).max()) for c, e in zip(rounded, exact, strict=True)]
    table = _tables(exact, rounded, scale, size) if size <= TABLE_CODES else torch.zeros(0, device=device)
    largest = tuple(float(c_KD.norm(dim=1).max()) for c_KD in rounded)
    return Levels(exact, plain_LKD, scale, half_LKD, norm_LK, table, tuple(error), largest)


def _tables(
    exact: Sequence[torch.Tensor], rounded: Sequence[torch.Tensor], scale: float, size: int
) -> torch.Tensor:
    table = torch.zeros(len(exact), len(exact), size, size, device=exact[0].device)
    for level in range(len(exact)):
        for earlier in range(level):
            product_JK = 2.0 * scale * exact[earlier] @ rounded[level].T
            table[level, earlier, : len(exact[earlier]), : len(rounded[level])] = product_JK.float()
    return table


def bounds(level: int, levels: Levels) -> tuple[float, float, float]:
    """(a, b, c): a score errs by at most a |r| + b |x| + c |lost|.

    Rounded codes meet the residual r. Products of float16 are exact in float32; their D sums lose 2^-24 each,
    up to 2^-22 where a tensor core truncates after aligning. What float16 took from x meets the codes.
    """
    sums = (levels.shape[2] + 64) * 2.0**-22
    largest = levels.largest[level]
    return 2.02 * levels.rounding[level], 2.02 * sums * largest, 2.02 * largest


def has_triton(levels: Levels) -> bool:
    """Whether the kernels of `assign_triton` can run where the codebooks lie."""
    return levels.half_LKD.is_cuda and importlib.util.find_spec("triton") is not None
