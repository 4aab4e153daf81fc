"""The two loops of CPU assignment: round the rows for the product, then settle one level of a block."""
# n rows, D dims, K codes of a level, P codes of earlier levels, M codes of all levels

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from prerank_tools.quantizers.assign import COARSE_TIE

FAST = {"reassoc", "contract", "nsz"}  # sums may be reordered: every use is covered by an error bound
UNIT = np.float32(2.0**-24)


def _jit(function: Callable[..., Any]) -> Any:
    """Compile without the GIL and remember the machine code where a cache folder can be written."""
    options: dict[str, Any] = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # read-only site-packages and no home folder
        return numba.njit(**options)(function)


def _inline(function: Callable[..., Any]) -> Any:
    """A numba intrinsic, which type checkers take for a call with a typing context."""
    return intrinsic(function)


@_inline
def _bits(typingctx: Any, value: Any) -> Any:
    """The int32 with the bits of a float32: ordered alike for positive floats, and its minimum vectorises."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), codegen


@_inline
def _float(typingctx: Any, value: Any) -> Any:
    """The float32 with the bits of an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


@_inline
def _widen(typingctx: Any, value: Any) -> Any:
    """A product as float32: bf16 given as uint16 moves to the upper half, float32 stays."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if value == types.float32:
            return args[0]
        int32 = context.get_value_type(types.int32)
        wide = builder.shl(builder.zext(args[0], int32), int32(16))
        return builder.bitcast(wide, context.get_value_type(types.float32))

    return types.float32(value), codegen


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
        bits = _bits(value)
        bits = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) & np.int32(-65536)
        kept = _float(bits)
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
def settle_level(
    product_nM: np.ndarray,
    column: int,
    norm_K: np.ndarray,
    table_PK: np.ndarray,
    bound: np.ndarray,
    table_start: int,
    start: int,
    x_nD: np.ndarray,
    flat_MD: np.ndarray,
    picked_nL: np.ndarray,
    first: int,
    depth: int,
    norms_n3: np.ndarray,
    unsure_n: np.ndarray,
) -> None:
    """Write the nearest code of one level into `picked_nL[:, first + depth]`, as a row of `flat_MD`.

    Columns `column` .. of `product_nM` are -2 x.c, as bf16 bits or float32. `norms_n3[:, 2]`, a bound on the
    residual's squared length, goes to the next. A row is `unsure_n` when float64 cannot part its best two.
    """
    size = len(norm_K)
    codebook_KD = flat_MD[start : start + size]
    low_K = np.empty(size, dtype=np.float32)
    sum_K = np.empty(size, dtype=np.float32)
    r_D = np.empty(x_nD.shape[1], dtype=np.float64)
    for row in range(len(product_nM)):
        square = norms_n3[row, 2]
        margin = norms_n3[row, 0] * bound[0] + np.sqrt(square) * bound[1] + norms_n3[row, 1] * bound[2]
        margin += bound[3] + np.float32(16.0) * UNIT * square
        offset = square + margin  # keeps every sum positive, so that its bits are ordered
        product_K = product_nM[row, column : column + size]
        base_K = table_PK[picked_nL[row, first] - table_start if depth > 0 else 0]
        if depth > 1:
            _add_tables(base_K, table_PK, picked_nL, row, first + 1, first + depth, table_start, sum_K)
            base_K = sum_K
        least = _lower_bounds(product_K, base_K, offset, low_K)
        limit = _bits(_float(least) + np.float32(2.0) * margin)
        count, code, last = _candidates(low_K, limit)
        if count > 1:
            _residual64(x_nD, flat_MD, picked_nL, row, first + depth, r_D)
            scale = np.float64(square) + np.float64(norm_K[code])
            step = last - code if count == 2 else np.int32(1)
            code, gap, best = _measure(r_D, codebook_KD, low_K, limit, code, last, step)
            unsure_n[row] |= gap <= COARSE_TIE * (scale + best)
        picked_nL[row, first + depth] = start + code
        # A bf16 product's own rounding was taken off the lower bound; an upper bound has it twice.
        slack = np.float32(2.0) * _rounding(product_nM) * abs(_widen(product_K[code]))
        norms_n3[row, 2] = max(low_K[code], np.float32(0.0)) + slack


@_jit
def _add_tables(
    base_K: np.ndarray,
    table_PK: np.ndarray,
    picked_nL: np.ndarray,
    row: int,
    begin: int,
    end: int,
    table_start: int,
    sum_K: np.ndarray,
) -> None:
    """Into another array than `base_K`: sums in place would not be vectorised."""
    table_K = table_PK[picked_nL[row, begin] - table_start]
    for k in range(len(sum_K)):
        sum_K[k] = base_K[k] + table_K[k]
    for level in range(begin + 1, end):
        table_K = table_PK[picked_nL[row, level] - table_start]
        for k in range(len(sum_K)):
            sum_K[k] += table_K[k]


@_jit
def _lower_bounds(product_K: np.ndarray, base_K: np.ndarray, offset: float, low_K: np.ndarray) -> Any:
    """Distances less the product's own rounding; returns the bits of the least upper bound."""
    output = _rounding(product_K)
    least = np.int32(0x7F7FFFFF)
    for k in range(len(low_K)):
        product = _widen(product_K[k])
        distance = product + (base_K[k] + offset)
        slip = abs(product) * output
        low_K[k] = distance - slip
        least = min(least, _bits(distance + slip))
    return least


@_jit
def _candidates(low_K: np.ndarray, limit: int) -> Any:
    """(how many, first, last) of the codes that may be the nearest."""
    size = len(low_K)
    count = np.int32(0)
    first = np.int32(size)
    last = np.int32(-1)
    for k in range(size):
        near = _bits(low_K[k]) <= limit
        count += np.int32(near)
        first = min(first, np.int32(k) if near else np.int32(size))
        last = max(last, np.int32(k) if near else np.int32(-1))
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
    r_D: np.ndarray, codebook_KD: np.ndarray, low_K: np.ndarray, limit: int, first: int, last: int, step: int
) -> Any:
    """(nearest candidate, its lead over the second, its squared distance), in float64."""
    code = first
    best = np.inf
    second = np.inf
    for k in range(first, last + 1, step):
        if _bits(low_K[k]) <= limit:
            c_D = codebook_KD[k]
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


@_jit
def _rounding(product: np.ndarray) -> Any:
    """Relative rounding of a product: 2^-8 in bf16, in float32 covered by the bound of the level."""
    return np.float32(2.0**-8) if product.itemsize == 2 else np.float32(0.0)
