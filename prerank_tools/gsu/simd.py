"""Vector code that numba cannot be brought to make: fixed-order dots, unit bf16 rows, int16 maxima, masks.

They are plain LLVM vector operations, so any x86-64-v3 or newer CPU runs them; only the speed differs.
Rows are contiguous float32, float16 (as a uint16 view: numba has no half type) or int8, their width a
multiple of 16.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from prerank_tools.compiled import vector_code

LANES = 16
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_STORED = {types.float64: _F64, types.float32: _F32, types.uint16: ir.HalfType(), types.int8: ir.IntType(8)}


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
            # A product of two stored values is exact in float64, so a fused step rounds as two would.
            builder.store(_fused(builder, x_L, y_L, builder.load(total)), total)
        return _halving_sum(builder, builder.load(total))

    return types.float64(x_VD, types.int64, y_VD, types.int64), codegen


@vector_code
def lane_dots_4x2(typingctx: Any, x_ND: Any, x_row: Any, y_CD: Any, y_row: Any, out_CN: Any) -> Any:
    """`lane_dot` of four rows of `x_ND` with two of `y_CD`, both float64, to `out_CN[y_row, x_row]` and on.

    The same bits in 5 ns a pair: eight sums hide each other's latency and share the loads and the halving.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows = [builder.add(args[1], ir.Constant(_I64, i)) for i in range(4)]
        columns = [builder.add(args[3], ir.Constant(_I64, i)) for i in range(2)]
        xs = [_row(context, builder, signature.args[0], args[0], row) for row in rows]
        ys = [_row(context, builder, signature.args[2], args[2], row)[0] for row in columns]
        zero = ir.Constant(ir.VectorType(_F64, LANES), [0.0] * LANES)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(8)]
        with cgutils.for_range(builder, xs[0][1], intp=_I64) as loop:
            x_4L = [_load(builder, types.float64, x, loop.index) for x, _ in xs]
            y_2L = [_load(builder, types.float64, y, loop.index) for y in ys]
            for i, total in enumerate(totals):
                fused = _fused(builder, x_4L[i % 4], y_2L[i // 4], builder.load(total))
                builder.store(fused, total)
        dots_8 = _halving_sums(builder, [builder.load(total) for total in totals])
        for i, column in enumerate(columns):
            row, _ = _row(context, builder, signature.args[4], args[4], column)
            four = _pick(builder, dots_8, range(4 * i, 4 * i + 4))
            at = builder.bitcast(builder.gep(row, [args[1]]), four.type.as_pointer())
            builder.store(four, at, align=8)
        return context.get_dummy_value()

    return types.void(x_ND, types.int64, y_CD, types.int64, out_CN), codegen


@vector_code
def widen_row(typingctx: Any, x_VD: Any, x_row: Any, out_ND: Any, out_row: Any) -> Any:
    """Write row `x_row` as float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, steps = _row(context, builder, signature.args[0], args[0], args[1])
        out, _ = _row(context, builder, signature.args[2], args[2], args[3])
        with cgutils.for_range(builder, steps, intp=_I64) as loop:
            _store(builder, _load(builder, signature.args[0].dtype, x, loop.index), out, loop.index)
        return context.get_dummy_value()

    return types.void(x_VD, types.int64, out_ND, types.int64), codegen


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
            builder.store(_fused(builder, lost_L, lost_L, builder.load(lost)), lost)
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
def take_in_32(
    typingctx: Any, keys_nC: Any, row: Any, at: Any, seen_1C: Any, maxima_GC: Any, group: Any
) -> Any:
    """Make 32 keys of a behaviour monotone, hide it from those who see fewer, raise its group's maxima."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        keys = _keys_32(context, builder, signature.args[0], args[0], args[1], args[2])
        seen = _keys_32(context, builder, signature.args[3], args[3], ir.Constant(_I64, 0), args[2])
        maxima = _keys_32(context, builder, signature.args[4], args[4], args[5], args[2])
        key_C = builder.load(keys, align=2)
        sign_C = builder.ashr(key_C, ir.Constant(key_C.type, [15] * 32))
        flip_C = builder.and_(sign_C, ir.Constant(key_C.type, [0x7FFF] * 32))
        here = _splat(builder, builder.trunc(args[1], _I16), 32)
        visible = builder.icmp_signed(">", builder.load(seen, align=2), here)
        hidden_C = ir.Constant(key_C.type, [-32768] * 32)
        key_C = builder.select(visible, builder.xor(key_C, flip_C), hidden_C)
        builder.store(key_C, keys, align=2)
        old_C = builder.load(maxima, align=2)
        builder.store(builder.select(builder.icmp_signed(">", key_C, old_C), key_C, old_C), maxima, align=2)
        return context.get_dummy_value()

    return types.void(keys_nC, types.int64, types.int64, seen_1C, maxima_GC, types.int64), codegen


@vector_code
def count_32(typingctx: Any, keys_nC: Any, at: Any, low_1B: Any, count_1B: Any) -> Any:
    """How many of the keys of each of 32 candidates from `at` on reach `low_1B`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero, view = ir.Constant(_I64, 0), context.make_array(signature.args[0])(context, builder, args[0])
        rows = cgutils.unpack_tuple(builder, view.shape, 2)[0]
        low = _keys_32(context, builder, signature.args[2], args[2], zero, zero)
        out = _keys_32(context, builder, signature.args[3], args[3], zero, zero)
        low_B = builder.load(low, align=2)
        count = cgutils.alloca_once_value(builder, ir.Constant(low_B.type, [0] * 32))
        with cgutils.for_range(builder, rows, intp=_I64) as loop:
            keys = _keys_32(context, builder, signature.args[0], args[0], loop.index, args[1])
            reached = builder.icmp_signed(">=", builder.load(keys, align=2), low_B)
            one_more = builder.add(builder.load(count), ir.Constant(low_B.type, [1] * 32))
            builder.store(builder.select(reached, one_more, builder.load(count)), count)
        builder.store(builder.load(count), out, align=2)
        return context.get_dummy_value()

    return types.void(keys_nC, types.int64, low_1B, count_1B), codegen


@vector_code
def reaching_32(typingctx: Any, keys_nC: Any, row: Any, at: Any, low_1C: Any) -> Any:
    """Bit i of the answer says whether a behaviour's key of candidate `at + i` reaches its `low_1C`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        keys = _keys_32(context, builder, signature.args[0], args[0], args[1], args[2])
        low = _keys_32(context, builder, signature.args[3], args[3], ir.Constant(_I64, 0), args[2])
        reached = builder.icmp_signed(">=", builder.load(keys, align=2), builder.load(low, align=2))
        return builder.zext(builder.bitcast(reached, _I32), _I64)

    return types.int64(keys_nC, types.int64, types.int64, low_1C), codegen


@vector_code
def fetch_row(typingctx: Any, x_VD: Any, x_row: Any) -> Any:
    """Ask for a row of the table that will soon be read."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, steps = _row(context, builder, signature.args[0], args[0], args[1])
        byte = ir.IntType(8).as_pointer()
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        )
        read, near, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
        with cgutils.for_range(builder, steps, intp=_I64) as loop:
            line = builder.gep(x, [builder.mul(loop.index, ir.Constant(_I64, LANES))])
            builder.call(prefetch, [builder.bitcast(line, byte), read, near, data])
        return context.get_dummy_value()

    return types.void(x_VD, types.int64), codegen


@vector_code
def count_above(typingctx: Any, sims_1B: Any, size: Any, step: Any, count_1B: Any) -> Any:
    """Write how many of the first `size` float64 values exceed each of the 16 from 16 `step` on (int64)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sims, _ = _row(context, builder, signature.args[0], args[0], ir.Constant(_I64, 0))
        out, _ = _row(context, builder, signature.args[3], args[3], ir.Constant(_I64, 0))
        mine_L = _load(builder, types.float64, sims, args[2])
        count = cgutils.alloca_once_value(builder, _constant(_I64, 0))
        with cgutils.for_range(builder, args[1], intp=_I64) as loop:
            one_L = _splat(builder, builder.load(builder.gep(sims, [loop.index])), LANES)
            above = builder.fcmp_ordered(">", one_L, mine_L)
            more_L = builder.add(builder.load(count), _constant(_I64, 1))
            builder.store(builder.select(above, more_L, builder.load(count)), count)
        _store(builder, builder.load(count), out, args[2])
        return context.get_dummy_value()

    return types.void(sims_1B, types.int64, types.int64, count_1B), codegen


@vector_code
def count_reaching(typingctx: Any, sims_CN: Any, row: Any, size: Any, low: Any) -> Any:
    """How many of the first `size` float64 values of a row are at least `low`; `size` a multiple of 16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sims, _ = _row(context, builder, signature.args[0], args[0], args[1])
        low_L = _splat(builder, args[3], LANES)
        count = cgutils.alloca_once_value(builder, _constant(_I64, 0))
        steps = builder.udiv(args[2], ir.Constant(_I64, LANES))
        with cgutils.for_range(builder, steps, intp=_I64) as loop:
            reached = builder.fcmp_ordered(">=", _load(builder, types.float64, sims, loop.index), low_L)
            more_L = builder.add(builder.load(count), _constant(_I64, 1))
            builder.store(builder.select(reached, more_L, builder.load(count)), count)
        return _halving_sum(builder, builder.load(count))

    return types.int64(sims_CN, types.int64, types.int64, types.float64), codegen


def _row(context: Any, builder: Any, array_type: Any, array: Any, row: Any) -> tuple[Any, Any]:
    """Pointer to the row's first value, and how many vectors of 16 it has."""
    view = context.make_array(array_type)(context, builder, array)
    width = cgutils.unpack_tuple(builder, view.shape, 2)[1]
    pointer = builder.gep(view.data, [builder.mul(row, width)])
    return pointer, builder.udiv(width, ir.Constant(_I64, LANES))


def _keys_32(context: Any, builder: Any, array_type: Any, array: Any, row: Any, at: Any) -> Any:
    """Pointer to 32 int16 keys of a row."""
    keys, _ = _row(context, builder, array_type, array, row)
    return builder.bitcast(builder.gep(keys, [at]), ir.VectorType(_I16, 32).as_pointer())


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
    """Round half away from zero, by adding half of the last kept bit; finite values only."""
    bits_L = builder.bitcast(unit_L, ir.VectorType(_I32, LANES))
    return builder.lshr(builder.add(bits_L, _constant(_I32, 0x8000)), _constant(_I32, 16))


def _fused(builder: Any, x_L: Any, y_L: Any, z_L: Any) -> Any:
    """x y + z, rounded once."""
    kind = x_L.type
    name = f"llvm.fma.v{kind.count}f{64 if kind.element == _F64 else 32}"
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(fma, [x_L, y_L, z_L])


def _halving_sum(builder: Any, total: Any) -> Any:
    add = builder.add if isinstance(total.type.element, ir.IntType) else builder.fadd
    width = LANES
    while width > 1:
        width //= 2
        low, high = (_pick(builder, total, range(start, start + width)) for start in (0, width))
        total = add(low, high)
    return builder.extract_element(total, ir.Constant(_I32, 0))


def _halving_sums(builder: Any, totals: list[Any]) -> Any:
    """`_halving_sum` of eight vectors at once, as one vector: two halves share a register at each step."""
    eights = [
        builder.fadd(_pick(builder, total, range(8)), _pick(builder, total, range(8, 16))) for total in totals
    ]
    for width in (4, 2, 1):
        lows = [lane for lane in range(16) if lane // width % 2 == 0]
        both = zip(eights[::2], eights[1::2], strict=True)
        eights = [
            builder.fadd(_blend(builder, a, b, lows), _blend(builder, a, b, [lane + width for lane in lows]))
            for a, b in both
        ]
    return eights[0]


def _blend(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


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
