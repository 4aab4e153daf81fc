"""The two loops of CPU assignment: round the rows for the product, then settle one level of a block."""
# n rows, D dims, K codes of a level, P codes of earlier levels, M codes of all levels

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from prerank_tools.bits import highest_bit, lowest_bit, set_bits
from prerank_tools.compiled import kernel
from prerank_tools.quantizers.assign import COARSE_TIE
from prerank_tools.quantizers.assign_simd import (
    WIDTH,
    add_rows,
    bits_of,
    distances,
    float_of,
    widen,
    within_64,
)
from prerank_tools.tiles import SIDE, multiply_32, tiles_off, tiles_on

FAST = {"reassoc", "contract", "nsz"}  # sums may be reordered: every use is covered by an error bound
UNIT = np.float32(2.0**-24)


_jit = kernel(fastmath=FAST)
_jit_inlined = kernel(fastmath=FAST, inlined=True)


class Tables(NamedTuple):
    """What the levels of one product need; `T` values of tables, one after the other, rows padded to 64.

    Level l has codes `start_L[l]` .. of the flat codebook, columns `column_L[l]` .. of the product, and its
    table begins at `table_L[l]`: a row of |c|^2 - 2 sum c_j.c for each code of the earlier levels.
    """

    start_L: np.ndarray
    width_L: np.ndarray
    column_L: np.ndarray
    table_L: np.ndarray
    table_T: np.ndarray
    bound_L4: np.ndarray
    norm_M: np.ndarray


@_jit
def round_rows(
    x_nD: np.ndarray,
    shift_D: np.ndarray,
    shift_norm: float,
    flat_MD: np.ndarray,
    picked_nL: np.ndarray,
    operand_nD: np.ndarray,
) -> np.ndarray:
    """Write x - shift - picked codes into `operand_nD` (bf16 bits or float32).

    Returns (n, 3) float32 upper bounds: of the rounding |x - x'|, of |x'|, and of |x|^2.
    """
    n, dims = x_nD.shape
    norms_n3 = np.empty((n, 3), dtype=np.float32)
    narrow = operand_nD.itemsize == 2
    t_nD = np.empty((1, dims), dtype=np.float32)
    for row in range(n):
        if picked_nL.shape[1] > 0:
            _residual32(x_nD, flat_MD, picked_nL, row, t_nD)
            error, norm = _round_row(t_nD, 0, shift_D, operand_nD, row, narrow)
        else:
            error, norm = _round_row(x_nD, row, shift_D, operand_nD, row, narrow)
        # float32 loses at most UNIT of each operand of the subtraction, and 1e-4 of the sums.
        length = np.sqrt(norm) * np.float32(1.001) + np.sqrt(error)
        lost = np.float32(8.0) * UNIT * (length + np.float32(2.0) * shift_norm)
        norms_n3[row, 0] = np.sqrt(error) * np.float32(1.001) + lost
        norms_n3[row, 1] = length + lost
        norms_n3[row, 2] = norms_n3[row, 1] * norms_n3[row, 1]
    return norms_n3


@_jit
def tile_group(
    x_nD: np.ndarray,
    shift_D: np.ndarray,
    shift_norm: float,
    pairs_PM: np.ndarray,
    tables: Tables,
    flat_MD: np.ndarray,
    picked_nL: np.ndarray,
    first: int,
    unsure_n: np.ndarray,
    operand_SD: np.ndarray,
    product_SM: np.ndarray,
    shapes: np.ndarray,
) -> None:
    """All of a group of levels with the matrix unit, as few rows at a time as the buffers hold (64).

    They stay in the cache from rounding to the last level.
    """
    rows = len(operand_SD)
    for low in range(0, len(x_nD), rows):
        part = slice(low, min(low + rows, len(x_nD)))
        norms_n3 = round_rows(x_nD[part], shift_D, shift_norm, flat_MD, picked_nL[part, :first], operand_SD)
        tiles_on(shapes)
        for at in range(0, pairs_PM.shape[1], SIDE):
            for row in range(0, rows, SIDE):
                multiply_32(operand_SD, row, pairs_PM, at, product_SM, row, at)
        tiles_off()
        settle(product_SM, tables, x_nD[part], flat_MD, picked_nL[part], first, norms_n3, unsure_n[part])


@_jit
def _round_row(
    t_nD: np.ndarray, at: int, shift_D: np.ndarray, operand_nD: np.ndarray, row: int, narrow: bool
) -> Any:
    """Write one row's operand; returns the squared norms of what rounding took and of what it left."""
    error = np.float32(0.0)
    norm = np.float32(0.0)
    if not narrow:
        for d in range(len(shift_D)):
            value = t_nD[at, d] - shift_D[d]
            operand_nD[row, d] = value
            norm += value * value
        return error, norm
    for d in range(len(shift_D)):
        value = t_nD[at, d] - shift_D[d]
        bits = bits_of(value)
        bits = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) & np.int32(-65536)
        kept = float_of(bits)
        operand_nD[row, d] = (bits >> np.int32(16)) & np.int32(0xFFFF)
        error += (value - kept) * (value - kept)
        norm += kept * kept
    return error, norm


@_jit
def _residual32(
    x_nD: np.ndarray, flat_MD: np.ndarray, picked_nL: np.ndarray, row: int, t_nD: np.ndarray
) -> None:
    """x minus the picked codes, rounded once."""
    for d in range(x_nD.shape[1]):
        value = np.float64(x_nD[row, d])
        for level in range(picked_nL.shape[1]):
            value -= np.float64(flat_MD[picked_nL[row, level], d])
        t_nD[0, d] = np.float32(value)


@_jit
def settle(
    product_nM: np.ndarray,
    tables: Tables,
    x_nD: np.ndarray,
    flat_MD: np.ndarray,
    picked_nL: np.ndarray,
    first: int,
    norms_n3: np.ndarray,
    unsure_n: np.ndarray,
) -> None:
    """Write the nearest code of the levels from `first` on into `picked_nL`, as rows of `flat_MD`.

    `product_nM` holds -2 x.c, as bf16 bits or float32. A row is `unsure_n` when float64 cannot part its best
    two. `norms_n3[:, 2]`, a bound on the residual's squared length, goes from level to level.
    """
    rounding = np.float32(2.0**-8) if product_nM.itemsize == 2 else np.float32(0.0)
    low_K = np.empty(tables.width_L.max(), dtype=np.float32)
    sum_K = np.empty_like(low_K)
    r_D = np.empty(x_nD.shape[1], dtype=np.float64)
    table_T, bound_L4, width_L = tables.table_T, tables.bound_L4, tables.width_L
    for row in range(len(x_nD)):
        square = norms_n3[row, 2]
        for depth in range(len(width_L)):
            bound, width, start = bound_L4[depth], width_L[depth], tables.start_L[depth]
            margin = norms_n3[row, 0] * bound[0] + np.sqrt(square) * bound[1] + norms_n3[row, 1] * bound[2]
            margin += bound[3] + np.float32(16.0) * UNIT * square
            column, at = tables.column_L[depth], tables.table_L[depth]
            if depth > 0:
                at += (picked_nL[row, first] - tables.start_L[0]) * width
            if depth < 2:
                least = distances(product_nM, row, column, table_T, at, width, rounding, low_K)
            else:
                _add_tables(tables, picked_nL, row, first, depth, at, sum_K)
                least = distances(product_nM, row, column, sum_K, 0, width, rounding, low_K)
            limit = least + np.float32(2.0) * margin
            if not limit < np.float32(1e38):  # squares that float32 does not hold
                unsure_n[row] = True
                picked_nL[row, first + depth] = start
                continue
            count, code, last = _candidates(low_K, width, limit)
            if count > 1:
                _residual64(x_nD, flat_MD, picked_nL, row, first + depth, r_D)
                scale = np.float64(square) + np.float64(tables.norm_M[start - tables.start_L[0] + code])
                step = last - code if count == 2 else 1
                code, gap, best = _measure(r_D, flat_MD, start, low_K, limit, code, last, step)
                unsure_n[row] |= gap <= COARSE_TIE * (scale + best)
            picked_nL[row, first + depth] = start + code
            # A bf16 product's own rounding was taken off the lower bound; an upper bound has it twice.
            slack = np.float32(2.0) * rounding * abs(widen(product_nM[row, column + code]))
            square = max(square + margin + low_K[code], np.float32(0.0)) + slack


@_jit_inlined
def _add_tables(
    tables: Tables, picked_nL: np.ndarray, row: int, first: int, depth: int, at: int, sum_K: np.ndarray
) -> None:
    """The row `at` of the level's table, that of its first earlier code, and those of the others."""
    width = tables.width_L[depth]
    table = tables.table_L[depth]
    for level in range(1, depth):
        other = table + (picked_nL[row, first + level] - tables.start_L[0]) * width
        if level == 1:
            add_rows(tables.table_T, at, tables.table_T, other, width, sum_K)
        else:
            add_rows(sum_K, 0, tables.table_T, other, width, sum_K)


@_jit_inlined
def _candidates(low_K: np.ndarray, width: int, limit: float) -> Any:
    """(how many, first, last) of the codes that may be the nearest."""
    count, first, last = 0, 0, 0
    for at in range(0, width, WIDTH):
        bits = within_64(low_K, at, limit)
        if bits != 0:
            if count == 0:
                first = at + lowest_bit(bits)
            last = at + highest_bit(bits)
            count += set_bits(bits)
    return count, first, last


@_jit
def _residual64(
    x_nD: np.ndarray, flat_MD: np.ndarray, picked_nL: np.ndarray, row: int, levels: int, r_D: np.ndarray
) -> None:
    x_D = x_nD[row]
    for d in range(len(r_D)):
        r_D[d] = x_D[d]
    for level in range(levels):
        c_D = flat_MD[picked_nL[row, level]]
        for d in range(len(r_D)):
            r_D[d] -= c_D[d]


@_jit
def _measure(
    r_D: np.ndarray,
    flat_MD: np.ndarray,
    start: int,
    low_K: np.ndarray,
    limit: float,
    first: int,
    last: int,
    step: int,
) -> Any:
    """(nearest candidate, its lead over the second, its squared distance), in float64."""
    code = first
    best = np.inf
    second = np.inf
    for k in range(first, last + 1, step):
        if low_K[k] <= limit:
            c_D = flat_MD[start + k]
            distance = 0.0
            for d in range(len(r_D)):
                difference = r_D[d] - np.float64(c_D[d])
                distance += difference * difference
            if distance < best:
                second = best
                best = distance
                code = k
            elif distance < second:
                second = distance
    return code, second - best, best
