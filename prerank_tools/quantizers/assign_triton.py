"""One level of assignment as one kernel: product, tables, argmin and runner-up never leave the chip."""
# n rows, D dims, K codes, L levels; a program takes BN rows, in tiles of BK codes and BD dims

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from prerank_tools.quantizers.assign_torch import Levels, Rows, bounds


@dataclass(frozen=True)
class Tiling:
    """How the kernel is cut; results do not depend on it."""

    rows: int = 128
    codes: int = 256
    dims: int = 64
    warps: int = 8
    stages: int = 3


def nearest_triton(
    rows: Rows, levels: Levels, level: int, first: int, *, tiling: Tiling | None = None
) -> None:
    """`nearest_torch`, fused."""
    count, size, dims = levels.shape
    cut = tiling or Tiling()
    codes = min(cut.codes, size)
    a, b, c = bounds(level, levels)
    half_nD, half_KD = rows.half_nD, levels.half_LKD[level]
    if dims % cut.dims:
        half_nD, half_KD = (torch.nn.functional.pad(h, (0, -dims % cut.dims)) for h in (half_nD, half_KD))
    grid = (triton.cdiv(len(half_nD), cut.rows),)
    _nearest_kernel[grid](
        half_nD.contiguous(),
        half_KD.contiguous(),
        levels.norm_LK[level],
        levels.table_LLKK[level, first:] if level > first else half_KD,
        rows.codes_nL,
        rows.square_n,
        rows.length_n,
        rows.length_n if rows.lost_n is None else rows.lost_n,
        rows.doubt_n,
        len(half_nD),
        level,
        a,
        b,
        c if rows.lost_n is not None else 0.0,
        L=count,
        D=half_nD.shape[1],
        K=size,
        FIRST=first,
        EARLIER=level - first,
        BN=cut.rows,
        BK=codes,
        BD=cut.dims,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )


@triton.jit
def _nearest_kernel(
    x_ptr: Any,
    c_ptr: Any,
    norm_ptr: Any,
    table_ptr: Any,
    codes_ptr: Any,
    square_ptr: Any,
    length_ptr: Any,
    lost_ptr: Any,
    doubt_ptr: Any,
    n: Any,
    level: Any,
    a: Any,
    b: Any,
    c: Any,
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
    offset = square * (1.0 + 1.0 / (1 << 20)) + error  # keeps distances positive: their bits are then ordered
    dim = tl.arange(0, BD)
    column = tl.arange(0, BK)
    best = tl.full((BN,), 0x7F7FFFFF, tl.int32)
    second = tl.full((BN,), 0x7F7FFFFF, tl.int32)
    code = tl.zeros((BN,), tl.int32)
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
        runner = tl.min(tl.where(key == low[:, None], 0x7F7FFFFF, key), axis=1) & (-BK)
        at = low & (BK - 1)
        low = low & (-BK)
        nearer = low < best
        second = tl.minimum(tl.minimum(second, runner), tl.where(nearer, best, low))
        code = tl.where(nearer, tile + at, code)
        best = tl.where(nearer, low, best)
    least = best.to(tl.float32, bitcast=True)
    gap = second.to(tl.float32, bitcast=True) - least
    # Low bits cut off: at most BK / 2^23 of a distance. NaN must be a doubt, hence the negation.
    cut = least * (4.0 * BK / (1 << 23))
    doubt = tl.where(gap > 2.0 * error + cut, 0, 1) << level
    if EARLIER + FIRST > 0:
        doubt = doubt | tl.load(doubt_ptr + row)
    tl.store(codes_ptr + row * L + level, code, mask=live)
    tl.store(square_ptr + row, least * (1.0 + 4.0 * BK / (1 << 23)), mask=live)
    tl.store(doubt_ptr + row, doubt, mask=live)
