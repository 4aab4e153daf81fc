"""Vector code that numba cannot be brought to make: fixed-order dots, unit bf16 rows, int16 maxima, masks.

They are plain LLVM vector operations, so any x86-64-v3 or newer CPU runs them; only the speed differs.
Rows are contiguous float32, float16 (as a uint16 view: numba has no half type) or int8, their width a
multiple of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_STORED = {types.float64: _F64, types.float32: _F32, types.uint16: ir.HalfType(), types.int8: ir.IntType(8)}


# To a type checker an intrinsic is a call that also takes a typing context.
vector_code: Any = intrinsic


def kernel(function: Callable[..., Any]) -> Any:
    """Compile without the GIL, kept on disk where there is a place for it (not in a read-only installation).

    The kept code is renewed when the file of the function changes: touch the files that use an intrinsic of
    this one when it changes.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@vector_code
def lane_dot(typingctx: Any, x_VD: Any, x_row: Any, y_VD: Any, y_row: Any) -> Any:
    """`cosine.lane_dots` of rows of two tables: the same bits, in 25 ns at 128 dims."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, x_steps = _row(context, builder, signature.args[0], args[0], args[1])
        y, _ = _row(context, builder, signature.args[2], args[2], args[3])
        total = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(_F64, LANES), [0.0] * LANES))
        with cgutils.for_range(builder, x_steps, intp=_I64) as loop:
            x_L = _load(builder, signature.args[0].dtype, x, loop.index)
            y_L = _load(builder, signature.args[2].dtype, y, loop.index)
            builder.store(builder.fadd(builder.load(total), builder.fmul(x_L, y_L)), total)
        return _halving_sum(builder, builder.load(total))

    return types.float64(x_VD, types.int64, y_VD, types.int64), codegen


@vector_code
def widen_row(typingctx: Any, x_VD: Any, x_row: Any, out_1D: Any) -> Any:
    """Write row `x_row` as float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, steps = _row(context, builder, signature.args[0], args[0], args[1])
        out, _ = _row(context, builder, signature.args[2], args[2], ir.Constant(_I64, 0))
        with cgutils.for_range(builder, steps, intp=_I64) as loop:
            _store(builder, _load(builder, signature.args[0].dtype, x, loop.index), out, loop.index)
        return context.get_dummy_value()

    return types.void(x_VD, types.int64, out_1D), codegen


@vector_code
def unit_bf16_row(typingctx: Any, x_VD: Any, x_row: Any, inverse: Any, out_ND: Any, out_row: Any) -> Any:
    """Write row `x_row` times `inverse` as bf16 bits; the squared length (float32) of what rounding lost."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, steps = _row(context, builder, signature.args[0], args[0], args[1])
        out, _ = _row(context, builder, signature.args[3], args[3], args[4])
        scale = _splat(builder, args[2], LANES)
        lost = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(_F32, LANES), [0.0] * LANES))
        with cgutils.for_range(builder, steps, intp=_I64) as loop:
            unit_L = builder.fmul(_load(builder, signature.args[0].dtype, x, loop.index, _F32), scale)
            bits_L = _round_to_bf16(builder, unit_L)
            _store(builder, builder.trunc(bits_L, ir.VectorType(_I16, LANES)), out, loop.index)
            back_L = builder.bitcast(builder.shl(bits_L, _constant(_I32, 16)), ir.VectorType(_F32, LANES))
            lost_L = builder.fsub(unit_L, back_L)
            builder.store(builder.fadd(builder.load(lost), builder.fmul(lost_L, lost_L)), lost)
        return _halving_sum(builder, builder.load(lost))

    return types.float32(x_VD, types.int64, types.float32, out_ND, types.int64), codegen


@vector_code
def at_least_32(typingctx: Any, keys_CN: Any, row: Any, start: Any, low: Any) -> Any:
    """Bit i of the answer says whether int16 key `start + i` of the row reaches `low`; 32 must exist."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        keys, _ = _row(context, builder, signature.args[0], args[0], args[1])
        vector = ir.VectorType(_I16, 32)
        pointer = builder.bitcast(builder.gep(keys, [args[2]]), vector.as_pointer())
        reached = builder.icmp_signed(">=", builder.load(pointer, align=2), _splat(builder, args[3], 32))
        return builder.zext(builder.bitcast(reached, _I32), _I64)

    return types.int64(keys_CN, types.int64, types.int64, types.int16), codegen


@vector_code
def raise_to_32(typingctx: Any, maxima_1G: Any, at: Any, keys_CN: Any, row: Any, start: Any) -> Any:
    """Raise the 32 int16 maxima from `at` on to the row's keys from `start` on, where those are larger."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        maxima, _ = _row(context, builder, signature.args[0], args[0], ir.Constant(_I64, 0))
        keys, _ = _row(context, builder, signature.args[2], args[2], args[3])
        vector = ir.VectorType(_I16, 32).as_pointer()
        held = builder.bitcast(builder.gep(maxima, [args[1]]), vector)
        old = builder.load(held, align=2)
        new = builder.load(builder.bitcast(builder.gep(keys, [args[4]]), vector), align=2)
        builder.store(builder.select(builder.icmp_signed(">", new, old), new, old), held, align=2)
        return context.get_dummy_value()

    return types.void(maxima_1G, types.int64, keys_CN, types.int64, types.int64), codegen


@vector_code
def count_above(typingctx: Any, sims_1B: Any, steps: Any, sim: Any) -> Any:
    """How many of the first 16 `steps` float64 values exceed `sim`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sims, _ = _row(context, builder, signature.args[0], args[0], ir.Constant(_I64, 0))
        value = _splat(builder, args[2], LANES)
        total = cgutils.alloca_once_value(builder, ir.Constant(_I64, 0))
        with cgutils.for_range(builder, args[1], intp=_I64) as loop:
            above = builder.fcmp_ordered(">", _load(builder, types.float64, sims, loop.index), value)
            bits = builder.ctpop(builder.bitcast(above, _I16))
            builder.store(builder.add(builder.load(total), builder.zext(bits, _I64)), total)
        return builder.load(total)

    return types.int64(sims_1B, types.int64, types.float64), codegen


@vector_code
def trailing_zeros(typingctx: Any, bits: Any) -> Any:
    """Index of the lowest set bit."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


@vector_code
def set_bits(typingctx: Any, bits: Any) -> Any:
    """How many bits are set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.int64), codegen


def _row(context: Any, builder: Any, array_type: Any, array: Any, row: Any) -> tuple[Any, Any]:
    """Pointer to the row's first value, and how many vectors of 16 it has."""
    view = context.make_array(array_type)(context, builder, array)
    width = cgutils.unpack_tuple(builder, view.shape, 2)[1]
    pointer = builder.gep(view.data, [builder.mul(row, width)])
    return pointer, builder.udiv(width, ir.Constant(_I64, LANES))


def _load(builder: Any, stored: Any, pointer: Any, step: Any, wide: Any = _F64) -> Any:
    """16 stored values as float64 (or float32)."""
    at = builder.gep(pointer, [builder.mul(step, ir.Constant(_I64, LANES))])
    values = builder.load(builder.bitcast(at, ir.VectorType(_STORED[stored], LANES).as_pointer()), align=1)
    if stored is types.int8:
        return builder.sitofp(values, ir.VectorType(wide, LANES))
    return values if _STORED[stored] is wide else builder.fpext(values, ir.VectorType(wide, LANES))


def _store(builder: Any, values: Any, pointer: Any, step: Any) -> None:
    at = builder.gep(pointer, [builder.mul(step, ir.Constant(_I64, LANES))])
    builder.store(values, builder.bitcast(at, values.type.as_pointer()), align=1)


def _round_to_bf16(builder: Any, unit_L: Any) -> Any:
    """Round to nearest even, by adding 0x7fff and the last kept bit; finite values only."""
    bits_L = builder.bitcast(unit_L, ir.VectorType(_I32, LANES))
    last_L = builder.and_(builder.lshr(bits_L, _constant(_I32, 16)), _constant(_I32, 1))
    carried_L = builder.add(bits_L, builder.add(last_L, _constant(_I32, 0x7FFF)))
    return builder.lshr(carried_L, _constant(_I32, 16))


def _halving_sum(builder: Any, total: Any) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        low, high = (_pick(builder, total, range(start, start + width)) for start in (0, width))
        total = builder.fadd(low, high)
    return builder.extract_element(total, ir.Constant(_I32, 0))


def _pick(builder: Any, vector: Any, lanes: range) -> Any:
    mask = ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes))
    return builder.shuffle_vector(vector, vector, mask)


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    vector = builder.insert_element(
        ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, ir.Constant(_I32, 0)
    )
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _constant(kind: Any, value: int) -> Any:
    return ir.Constant(ir.VectorType(kind, LANES), [value] * LANES)
