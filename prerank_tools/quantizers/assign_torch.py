"""Exact residual assignment on a GPU: guesses by a float16 product, near ties settled in float64."""
# N items (n in a block), D dims, L levels, K codes of a level, R rows in doubt

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prerank_tools.quantizers.assign import COARSE_TIE, assign_exact

BLOCK = 1 << 21  # rows on the device at once
DOUBT_BLOCK = 1 << 17  # rows measured in float64 at once
SCORE_CELLS = 1 << 28  # scores held at once by the path without a kernel
TABLE_CODES = 1_024  # with wider levels, residuals are cheaper to read than code-by-code tables
MISSING = 1e30  # |c|^2 of a code that a smaller level lacks


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

    @property
    def wide(self) -> bool:
        """Whether each level starts from its residual instead of tables."""
        return self.half_LKD.shape[1] > TABLE_CODES


@dataclass
class Rows:
    """What a block of rows carries from level to level; all on the device, in scaled units."""

    half_nD: torch.Tensor  # float16 operand
    lost_n: torch.Tensor | None  # bound on what float16 took from it; None where nothing
    length_n: torch.Tensor  # bound on its norm
    square_n: torch.Tensor  # bound on the squared norm of the residual at the level at hand
    guessed: Guessed


@dataclass(frozen=True)
class Guessed:
    """Codes by the float16 product alone, and how sure they are.

    Bit l of a doubt: at level l the runner-up may be nearer; bit 16 + l: another code may be.
    """

    codes_nL: torch.Tensor  # int32
    runner_nL: torch.Tensor  # int32
    doubt_n: torch.Tensor  # int32


MANY = 16  # offset of the doubt bits that say that more than two codes are near
# Finds one level's codes and doubts from `rows`, whose operand stands for the residual before level `first`.
Nearest = Callable[[Rows, Levels, int, int], None]
# Tells code and runner-up apart in float64 at one level, for the given rows.
Verify = Callable[[torch.Tensor, torch.Tensor, Guessed, Levels, int], None]


def assign_torch(x_ND: np.ndarray, codebooks: Sequence[np.ndarray], *, device: str = "cuda") -> np.ndarray:
    """Codes (N, L) uint16, equal to `assign_exact`; `x_ND` float32, float16 or int8 on the host."""
    levels = put_levels(codebooks, device)
    codes_NL = np.empty((len(x_ND), len(codebooks)), dtype=np.uint16)
    for start in range(0, len(x_ND), BLOCK):
        x_nD = torch.from_numpy(np.ascontiguousarray(x_ND[start : start + BLOCK])).to(device)
        codes_NL[start : start + BLOCK] = assign_on_device(x_nD, levels).cpu().numpy().astype(np.uint16)
    return codes_NL


def assign_on_device(x_nD: torch.Tensor, levels: Levels, *, nearest: Nearest | None = None) -> torch.Tensor:
    """Codes (n, L) int32 of vectors that lie on the device, in any float type or int8."""
    guessed = guess(x_nD, levels, nearest or best_nearest(levels))
    settle(x_nD, guessed, levels)
    return guessed.codes_nL


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
    if _has_kernels(levels):
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
    if _has_kernels(levels):
        from prerank_tools.quantizers.assign_triton import lengths_triton

        return lengths_triton(half_nD)
    return torch.linalg.vector_norm(half_nD, dim=1, dtype=torch.float32)


def bounds(level: int, levels: Levels) -> tuple[float, float, float]:
    """(a, b, c): a score errs by at most a |r| + b |x| + c |lost|.

    Rounded codes meet the residual r. Products of float16 are exact in float32; their D sums lose 2^-24 each,
    up to 2^-22 where a tensor core truncates after aligning. What float16 took from x meets the codes.
    """
    sums = (levels.shape[2] + 64) * 2.0**-22
    largest = levels.largest[level]
    return 2.02 * levels.rounding[level], 2.02 * sums * largest, 2.02 * largest


def best_nearest(levels: Levels) -> Nearest:
    """The fused kernel where Triton can run it, else plain torch."""
    if _has_kernels(levels):
        from prerank_tools.quantizers.assign_triton import nearest_triton

        return nearest_triton
    return nearest_torch


def _has_kernels(levels: Levels) -> bool:
    return levels.half_LKD.is_cuda and importlib.util.find_spec("triton") is not None


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


def settle(x_nD: torch.Tensor, guessed: Guessed, levels: Levels, *, verify: Verify | None = None) -> int:
    """Measure rows in doubt in float64 and correct their codes in place; returns how many needed the CPU.

    Two codes are told apart by one dot product; among more, all are measured. A corrected code changes the
    residual, so the levels below are then open as well.
    """
    verify = verify or best_verify(levels)
    unsure_n = torch.zeros_like(guessed.doubt_n, dtype=torch.bool)
    for level in range(levels.shape[0]):
        both_n = guessed.doubt_n >> level & (1 | 1 << MANY)
        two_r = (both_n == 1).nonzero()[:, 0]
        if len(two_r):
            verify(x_nD, two_r, guessed, levels, level)
        for at_r in (guessed.doubt_n >> (level + MANY) & 1).nonzero()[:, 0].split(DOUBT_BLOCK):
            r_rD = x_nD[at_r].double()
            for earlier in range(level):
                r_rD -= levels.exact[earlier][guessed.codes_nL[at_r, earlier].long()]
            code_r, close_r = _nearest64(r_rD, levels.exact[level])
            moved_r = (code_r != guessed.codes_nL[at_r, level]).int()
            guessed.doubt_n[at_r] |= moved_r * _below(level)
            guessed.codes_nL[at_r, level] = code_r
            unsure_n[at_r] |= close_r
    rows_R = unsure_n.nonzero()[:, 0]
    if len(rows_R):
        codebooks = [c_KD.float().cpu().numpy() for c_KD in levels.exact]
        settled_RL = assign_exact(x_nD[rows_R].float().cpu().numpy(), codebooks)
        guessed.codes_nL[rows_R] = torch.from_numpy(settled_RL.astype(np.int32)).to(x_nD.device)
    return len(rows_R)


def _below(level: int) -> int:
    """Doubt bits that leave every level below open to all codes."""
    return (0x7FFF >> (level + 1) << (level + 1)) << MANY


def best_verify(levels: Levels) -> Verify:
    """The kernel where Triton can run it, else plain torch."""
    if _has_kernels(levels):
        from prerank_tools.quantizers.assign_triton import verify_triton

        return verify_triton
    return verify_torch


def verify_torch(
    x_nD: torch.Tensor, at_r: torch.Tensor, guessed: Guessed, levels: Levels, level: int
) -> None:
    """Code or runner-up: the sign of |r - a|^2 - |r - b|^2 in float64; what is too close stays open."""
    for at in at_r.split(DOUBT_BLOCK):
        r_rD = x_nD[at].double()
        for earlier in range(level):
            r_rD -= levels.exact[earlier][guessed.codes_nL[at, earlier].long()]
        a_rD = levels.exact[level][guessed.codes_nL[at, level].long()]
        b_rD = levels.exact[level][guessed.runner_nL[at, level].long()]
        lead_r = ((a_rD + b_rD - 2.0 * r_rD) * (a_rD - b_rD)).sum(1)
        scale_r = (r_rD.square() + a_rD.square() + b_rD.square()).sum(1)
        record_lead(at, lead_r, COARSE_TIE * scale_r, guessed, level)


def record_lead(
    at_r: torch.Tensor, lead_r: torch.Tensor, close_r: torch.Tensor, guessed: Guessed, level: int
) -> None:
    """Take the runner-up where it is nearer, and open the levels below; leave open what is too close."""
    open_r = lead_r.abs() <= close_r
    swap_r = (lead_r > 0) & ~open_r
    runner_r = guessed.runner_nL[at_r, level]
    guessed.codes_nL[at_r, level] = torch.where(swap_r, runner_r, guessed.codes_nL[at_r, level])
    guessed.doubt_n[at_r] |= open_r.int() << (level + MANY) | swap_r.int() * _below(level)


def _nearest64(r_rD: torch.Tensor, c_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(nearest codes int32, whether the second is too close for float64 sums in another order)."""
    if len(c_KD) == 1:
        nothing_r = torch.zeros(len(r_rD), dtype=torch.int32, device=r_rD.device)
        return nothing_r, nothing_r.bool()
    norm_K = c_KD.square().sum(1)
    two_r2, code_r2 = (norm_K - 2.0 * r_rD @ c_KD.T).topk(2, largest=False)
    scale_r = r_rD.square().sum(1) + norm_K.max()
    return code_r2[:, 0].int(), two_r2[:, 1] - two_r2[:, 0] <= COARSE_TIE * scale_r
