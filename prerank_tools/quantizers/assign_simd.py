"""Vector code of CPU assignment: distances of a row to all codes of a level, and which may be the least.

Explicit, because LLVM would halve the vectors and leave a float minimum scalar. Widths are multiples of 64.
"""
# n rows, M columns of a product, T values of all tables, K codes of a level

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from prerank_tools.compiled import vector_code

WIDTH = 64
_LANES = 16
_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_F32, _LANES), ir.VectorType(_I32, _LANES)


@vector_code
def distances(
    typingctx: Any,
    product_nM: Any,
    row: Any,
    column: Any,
    table_T: Any,
    at: Any,
    width: Any,
    rounding: Any,
    low_K: Any,
) -> Any:
    """Write product + table less the product's own rounding; returns the least sum with it added.

    The product is float32, or bf16 as uint16; `rounding` is relative and only counts for bf16.
    """
    narrow = product_nM.dtype == types.uint16

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = _matrix_at(context, builder, signature.args[0], args[0], args[1], args[2])
        table = builder.gep(_data(context, builder, signature.args[3], args[3]), [args[4]])
        low = _data(context, builder, signature.args[7], args[7])
        least = cgutils.alloca_once_value(builder, _all(_F32, 3.0e38))
        slip = _splat(builder, args[6])
        with cgutils.for_range(builder, _steps(builder, args[5]), intp=_I64) as loop:
            at = builder.mul(loop.index, ir.Constant(_I64, _LANES))
            p_K = _load(builder, product, at, _I16 if narrow else _F32)
            sum_K = builder.fadd(p_K, _load(builder, table, at, _F32))
            slip_K = builder.fmul(_absolute(builder, p_K), slip) if narrow else None
            _store(builder, builder.fsub(sum_K, slip_K) if narrow else sum_K, low, at)
            high_K = builder.fadd(sum_K, slip_K) if narrow else sum_K
            old_K = builder.load(least)
            builder.store(builder.select(builder.fcmp_ordered("<", high_K, old_K), high_K, old_K), least)
        return _least(builder, builder.load(least))

    place = types.int64
    return types.float32(product_nM, place, place, table_T, place, place, types.float32, low_K), codegen


@vector_code
def add_rows(typingctx: Any, a_T: Any, a_at: Any, b_T: Any, b_at: Any, width: Any, sum_K: Any) -> Any:
    """Write the sum of two runs of `width` values."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a = builder.gep(_data(context, builder, signature.args[0], args[0]), [args[1]])
        b = builder.gep(_data(context, builder, signature.args[2], args[2]), [args[3]])
        out = _data(context, builder, signature.args[5], args[5])
        with cgutils.for_range(builder, _steps(builder, args[4]), intp=_I64) as loop:
            at = builder.mul(loop.index, ir.Constant(_I64, _LANES))
            _store(builder, builder.fadd(_load(builder, a, at, _F32), _load(builder, b, at, _F32)), out, at)
        return context.get_dummy_value()

    place = types.int64
    return types.void(a_T, place, b_T, place, place, sum_K), codegen


@vector_code
def within_64(typingctx: Any, low_K: Any, at: Any, limit: Any) -> Any:
    """Bit i of the answer says whether value `at + i` is `limit` or less."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        low = builder.gep(_data(context, builder, signature.args[0], args[0]), [args[1]])
        limit, bits = _splat(builder, args[2]), ir.Constant(_I64, 0)
        for start in range(0, WIDTH, _LANES):
            low_K = _load(builder, low, ir.Constant(_I64, start), _F32)
            some = builder.bitcast(builder.fcmp_ordered("<=", low_K, limit), _I16)
            some = builder.shl(builder.zext(some, _I64), ir.Constant(_I64, start))
            bits = builder.or_(bits, some)
        return bits

    return types.int64(low_K, types.int64, types.float32), codegen


@vector_code
def bits_of(typingctx: Any, value: Any) -> Any:
    """The int32 with the bits of a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), codegen


@vector_code
def float_of(typingctx: Any, value: Any) -> Any:
    """The float32 with the bits of an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


@vector_code
def widen(typingctx: Any, value: Any) -> Any:
    """A product as float32: bf16 given as uint16 moves to the upper half, float32 stays."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if value == types.float32:
            return args[0]
        int32 = context.get_value_type(types.int32)
        wide = builder.shl(builder.zext(args[0], int32), int32(16))
        return builder.bitcast(wide, context.get_value_type(types.float32))

    return types.float32(value), codegen


def _data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def _matrix_at(context: Any, builder: Any, array_type: Any, array: Any, row: Any, column: Any) -> Any:
    view = context.make_array(array_type)(context, builder, array)
    width = cgutils.unpack_tuple(builder, view.shape, 2)[1]
    return builder.gep(view.data, [builder.add(builder.mul(row, width), column)])


def _steps(builder: Any, width: Any) -> Any:
    return builder.udiv(width, ir.Constant(_I64, _LANES))


def _load(builder: Any, pointer: Any, at: Any, kind: Any) -> Any:
    """16 values as float32; bf16 bits move to the upper half."""
    vector = ir.VectorType(kind, _LANES).as_pointer()
    values = builder.load(builder.bitcast(builder.gep(pointer, [at]), vector), align=2 if kind is _I16 else 4)
    if kind is _F32:
        return values
    wide = builder.shl(builder.zext(values, _INTS), _all(_I32, 16))
    return builder.bitcast(wide, _FLOATS)


def _store(builder: Any, values: Any, pointer: Any, at: Any) -> None:
    place = builder.bitcast(builder.gep(pointer, [at]), values.type.as_pointer())
    builder.store(values, place, align=4)


def _absolute(builder: Any, values: Any) -> Any:
    return builder.bitcast(builder.and_(builder.bitcast(values, _INTS), _all(_I32, 0x7FFFFFFF)), _FLOATS)


def _least(builder: Any, values: Any) -> Any:
    width = _LANES
    while width > 1:
        width //= 2
        halves = [
            builder.shuffle_vector(
                values, values, ir.Constant(ir.VectorType(_I32, width), list(range(start, start + width)))
            )
            for start in (0, width)
        ]
        values = builder.select(builder.fcmp_ordered("<", *halves), *halves)
    return builder.extract_element(values, ir.Constant(_I32, 0))


def _splat(builder: Any, value: Any) -> Any:
    vector = ir.Constant(ir.VectorType(value.type, _LANES), ir.Undefined)
    vector = builder.insert_element(vector, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(vector, vector, _all(_I32, 0))


def _all(kind: Any, value: float) -> Any:
    return ir.Constant(ir.VectorType(kind, _LANES), [value] * _LANES)
