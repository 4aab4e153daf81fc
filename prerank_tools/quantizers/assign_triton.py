"""Assignment in three kernels: a level's product with its argmin, the residual, and the test of two codes."""
# n rows, D dims, K codes, L levels; a program takes BN rows, in tiles of BK codes and BD dims

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from prerank_tools.quantizers.assign import COARSE_TIE
from prerank_tools.quantizers.assign_levels import Guessed, Levels, Rows, bounds
from prerank_tools.quantizers.assign_settle import record_lead

LARGEST = tl.constexpr(0x7F7FFFFF)  # bits of the largest float32


@dataclass(frozen=True)
class Tiling:
    """How the kernel is cut; codes do not depend on it."""

    rows: int = 128
    codes: int = 128
    dims: int = 64
    warps: int = 8
    stages: int = 3


def nearest_triton(
    rows: Rows, levels: Levels, level: int, first: int, *, tiling: Tiling | None = None
) -> None:
    """One level: scores, their three least and the doubts never leave the chip."""
    count, size, dims = levels.shape
    cut = tiling or (Tiling(codes=256) if levels.wide else Tiling(stages=4))  # the fastest on an H200
    a, b, c = bounds(level, levels)
    half_nD, half_KD = rows.half_nD, levels.half_LKD[level]
    if dims % cut.dims:
        half_nD, half_KD = (torch.nn.functional.pad(h, (0, -dims % cut.dims)) for h in (half_nD, half_KD))
    _nearest_kernel[(triton.cdiv(len(half_nD), cut.rows),)](
        half_nD.contiguous(),
        half_KD.contiguous(),
        levels.norm_LK[level],
        levels.table_LLKK[level, first:] if level > first else half_KD,
        rows.guessed.codes_nL,
        rows.guessed.runner_nL,
        rows.guessed.doubt_n,
        rows.square_n,
        rows.length_n,
        rows.length_n if rows.lost_n is None else rows.lost_n,
        len(half_nD),
        level,
        a,
        b,
        0.0 if rows.lost_n is None else c,
        L=count,
        D=half_nD.shape[1],
        K=size,
        FIRST=first,
        EARLIER=level - first,
        BN=cut.rows,
        BK=min(cut.codes, size),
        BD=cut.dims,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )


@triton.jit
def _nearest_kernel(
    x_ptr: tl.tensor,
    c_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    table_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    runner_ptr: tl.tensor,
    doubt_ptr: tl.tensor,
    square_ptr: tl.tensor,
    length_ptr: tl.tensor,
    lost_ptr: tl.tensor,
    n: tl.tensor,
    level: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    L: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    EARLIER: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    live = row < n
    row = tl.minimum(row, n - 1)  # rows past the end repeat the last one: loads need no mask
    square = tl.load(square_ptr + row)
    error = a * tl.sqrt(square) + b * tl.load(length_ptr + row) + c * tl.load(lost_ptr + row) + 1e-12
    # The offset keeps distances positive: their bits are then ordered as integers.
    offset = square * (1.0 + 1.0 / (1 << 20)) + error
    dim = tl.arange(0, BD)
    column = tl.arange(0, BK)
    best = tl.full((BN,), LARGEST, tl.int32)
    second = tl.full((BN,), LARGEST, tl.int32)
    third = tl.full((BN,), LARGEST, tl.int32)
    code = tl.zeros((BN,), tl.int32)
    runner = tl.zeros((BN,), tl.int32)
    for tile in range(0, K, BK):
        sum = tl.zeros((BN, BK), tl.float32)
        for d in range(0, D, BD):
            x = tl.load(x_ptr + row[:, None] * D + (d + dim)[None, :])
            y = tl.load(c_ptr + (tile + column)[None, :] * D + (d + dim)[:, None])
            sum = tl.dot(x, y, sum)
        sum += tl.load(norm_ptr + tile + column)[None, :]
        for earlier in tl.static_range(EARLIER):
            before = tl.load(codes_ptr + row * L + FIRST + earlier)
            sum += tl.load(table_ptr + (earlier * K + before)[:, None] * K + (tile + column)[None, :])
        # The column takes the low bits of the distance, so that one integer minimum finds both.
        key = (sum + offset[:, None]).to(tl.int32, bitcast=True)
        key = (key & (-BK)) | column[None, :]
        low = tl.min(key, axis=1)
        key = tl.where(key == low[:, None], LARGEST, key)
        next = tl.min(key, axis=1)
        key = tl.where(key == next[:, None], LARGEST, key)
        last = tl.min(key, axis=1) & (-BK)
        for turn in tl.static_range(2):
            found = low if turn == 0 else next
            at = tile + (found & (BK - 1))
            found = found & (-BK)
            first_of = found < best
            second_of = found < second
            third = tl.where(second_of, second, tl.minimum(third, found))
            second = tl.where(first_of, best, tl.minimum(second, found))
            runner = tl.where(first_of, code, tl.where(second_of, at, runner))
            code = tl.where(first_of, at, code)
            best = tl.minimum(best, found)
        third = tl.minimum(third, last)
    least = best.to(tl.float32, bitcast=True)
    # Low bits cut off: at most BK / 2^23 of a distance. NaN must be a doubt, hence the negations.
    limit = 2.0 * error + least * (4.0 * BK / (1 << 23))
    doubt = tl.where(second.to(tl.float32, bitcast=True) - least > limit, 0, 1) << level
    doubt |= tl.where(third.to(tl.float32, bitcast=True) - least > limit, 0, 1) << (level + 16)
    if EARLIER + FIRST > 0:
        doubt = doubt | tl.load(doubt_ptr + row)
    tl.store(codes_ptr + row * L + level, code, mask=live)
    tl.store(runner_ptr + row * L + level, runner, mask=live)
    tl.store(doubt_ptr + row, doubt, mask=live)
    tl.store(square_ptr + row, least * (1.0 + 4.0 * BK / (1 << 23)), mask=live)


def lengths_triton(half_nD: torch.Tensor) -> torch.Tensor:
    """Norms (n,) float32 in one pass at the speed of memory."""
    length_n = torch.empty(len(half_nD), device=half_nD.device)
    dims = half_nD.shape[1]
    cut = {"D": dims, "BN": 8, "BD": triton.next_power_of_2(dims)}
    _lengths_kernel[(triton.cdiv(len(half_nD), 8),)](half_nD, length_n, len(half_nD), **cut)
    return length_n


@triton.jit
def _lengths_kernel(
    x_ptr: tl.tensor, length_ptr: tl.tensor, n: tl.tensor, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    dim = tl.arange(0, BD)
    inside = (row < n)[:, None] & (dim < D)[None, :]
    x = tl.load(x_ptr + row[:, None] * D + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(length_ptr + row, tl.sqrt(tl.sum(x * x, axis=1)), mask=row < n)


def residual_triton(x_nD: torch.Tensor, guessed: Guessed, levels: Levels, level: int) -> Rows:
    """The operand of a level in one pass: scaled, less the codes above, in float16, with its bounds."""
    count, size, dims = levels.shape
    half_nD = torch.empty(x_nD.shape, dtype=torch.float16, device=x_nD.device)
    space = torch.empty(3, len(x_nD), device=x_nD.device)
    _residual_kernel[(triton.cdiv(len(x_nD), 4),)](
        x_nD.contiguous(),
        levels.plain_LKD,
        guessed.codes_nL,
        half_nD,
        space[0],
        space[1],
        space[2],
        len(x_nD),
        levels.scale,
        2.0**-22 * (level + 1),
        2.0**-22 * (level + 1) * sum(levels.largest[:level]),
        L=count,
        D=dims,
        K=size,
        EARLIER=level,
        BN=4,
        BD=triton.next_power_of_2(dims),
    )
    return Rows(half_nD, space[0], space[1], space[2], guessed)


@triton.jit
def _residual_kernel(
    x_ptr: tl.tensor,
    plain_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    half_ptr: tl.tensor,
    lost_ptr: tl.tensor,
    length_ptr: tl.tensor,
    square_ptr: tl.tensor,
    n: tl.tensor,
    scale: tl.tensor,
    of_length: tl.tensor,
    of_codes: tl.tensor,
    L: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    EARLIER: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    live = row < n
    row = tl.minimum(row, n - 1)
    dim = tl.arange(0, BD)
    inside = (dim < D)[None, :]
    r = tl.load(x_ptr + row[:, None] * D + dim[None, :], mask=inside, other=0.0).to(tl.float32) * scale
    for earlier in tl.static_range(EARLIER):
        code = tl.load(codes_ptr + row * L + earlier).to(tl.int64)
        at = (earlier * K + code) * D
        r -= tl.load(plain_ptr + at[:, None] + dim[None, :], mask=inside, other=0.0) * scale
    half = r.to(tl.float16)
    gone = r - half.to(tl.float32)
    length = tl.sqrt(tl.sum(r * r, axis=1))
    lost = tl.sqrt(tl.sum(gone * gone, axis=1)) * 1.001 + of_length * length + of_codes
    length = length * 1.001 + lost
    tl.store(half_ptr + row[:, None] * D + dim[None, :], half, mask=inside & live[:, None])
    tl.store(lost_ptr + row, lost, mask=live)
    tl.store(length_ptr + row, length, mask=live)
    tl.store(square_ptr + row, length * length, mask=live)


def verify_triton(
    x_nD: torch.Tensor, at_r: torch.Tensor, guessed: Guessed, levels: Levels, level: int
) -> None:
    """`verify_torch` in one pass: only the rows in doubt and their two codes are read."""
    count, size, dims = levels.shape
    lead = torch.empty(2, len(at_r), dtype=torch.float64, device=x_nD.device)
    _lead_kernel[(triton.cdiv(len(at_r), 4),)](
        x_nD.contiguous(),
        levels.plain_LKD,
        guessed.codes_nL,
        guessed.runner_nL,
        at_r,
        lead[0],
        lead[1],
        len(at_r),
        L=count,
        D=dims,
        K=size,
        LEVEL=level,
        BN=4,
        BD=triton.next_power_of_2(dims),
    )
    record_lead(at_r, lead[0], COARSE_TIE * lead[1], guessed, level)


@triton.jit
def _lead_kernel(
    x_ptr: tl.tensor,
    plain_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    runner_ptr: tl.tensor,
    at_ptr: tl.tensor,
    lead_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    n: tl.tensor,
    L: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    LEVEL: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    live = place < n
    row = tl.load(at_ptr + tl.minimum(place, n - 1))
    dim = tl.arange(0, BD)
    inside = (dim < D)[None, :]
    r = tl.load(x_ptr + row[:, None] * D + dim[None, :], mask=inside, other=0.0).to(tl.float64)
    for earlier in tl.static_range(LEVEL):
        code = tl.load(codes_ptr + row * L + earlier).to(tl.int64)
        at = (earlier * K + code) * D
        r -= tl.load(plain_ptr + at[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float64)
    code = (LEVEL * K + tl.load(codes_ptr + row * L + LEVEL).to(tl.int64)) * D
    other = (LEVEL * K + tl.load(runner_ptr + row * L + LEVEL).to(tl.int64)) * D
    ca = tl.load(plain_ptr + code[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float64)
    cb = tl.load(plain_ptr + other[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float64)
    lead = tl.sum((ca + cb - 2.0 * r) * (ca - cb), axis=1)
    scale = tl.sum(r * r + ca * ca + cb * cb, axis=1)
    tl.store(lead_ptr + place, lead, mask=live)
    tl.store(scale_ptr + place, scale, mask=live)
