"""Products of bf16 rows on the matrix unit of recent x86 CPUs (AMX), without a call out of compiled code.

A `torch.mm` costs 25 us before it multiplies anything, and rounds to bf16; this costs what it multiplies.
"""
# n rows, C columns, D dims, P = D / 2 pairs of dims

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from prerank_tools.compiled import vector_code

SIDE = 32  # rows and columns of a block: 2 x 2 tiles of 16 x 16, summed over D in steps of 32
STEP = 32
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES = _I8.as_pointer()


@cache
def have_tiles() -> bool:
    """Whether this CPU has the unit, and the system lets this process use it (it is asked to here)."""
    known = binding.get_host_cpu_features().get("amx-bf16", False)
    return bool(known and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())


def tile_shapes() -> np.ndarray:
    """What `tiles_on` loads: palette 1, eight tiles of 16 rows of 64 bytes; uint8 (64,)."""
    shapes = np.zeros(64, dtype=np.uint8)
    shapes[0] = 1
    shapes[16:32].view(np.uint16)[:] = 64
    shapes[48:56] = 16
    return shapes


@vector_code
def tiles_on(typingctx: Any, shapes: Any) -> Any:
    """Configure this thread's tiles."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, args[0])
        _call(builder, "ldtilecfg", builder.bitcast(view.data, _BYTES))
        return context.get_dummy_value()

    return types.void(shapes), codegen


@vector_code
def tiles_off(typingctx: Any) -> Any:
    """Leave the tiles, so that a switch of threads need not save them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


def paired(rows_CD: np.ndarray) -> np.ndarray:
    """bf16 rows (as 16-bit integers) as the unit wants its second operand: (P, C) int32, two dims in one."""
    return aligned(rows_CD.view(np.int32).T)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins on a cache line, as torch's memory does: tiles load rows that cross lines slowly."""
    return torch.from_numpy(np.ascontiguousarray(array)).clone().numpy()


@vector_code
def multiply_32(
    typingctx: Any, rows_nD: Any, row: Any, pairs_PC: Any, at: Any, out_nC: Any, out_row: Any, out_at: Any
) -> Any:
    """Float32 products of the 32 bf16 rows from `row` on and the 32 columns from `at` on, into `out_nC`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, a_bytes = _matrix(context, builder, signature.args[0], args[0], 2)
        b, b_bytes = _matrix(context, builder, signature.args[2], args[2], 4)
        out, out_bytes = _matrix(context, builder, signature.args[4], args[4], 4)
        a = builder.gep(a, [builder.mul(args[1], a_bytes)])
        b = builder.gep(b, [builder.mul(args[3], _number(4))])
        out = builder.gep(
            out, [builder.add(builder.mul(args[5], out_bytes), builder.mul(args[6], _number(4)))]
        )
        for tile in range(4):
            _call(builder, "tilezero", _tile(tile))
        with cgutils.for_range(builder, builder.udiv(a_bytes, _number(2 * STEP)), intp=_I64) as loop:
            a_at = builder.gep(a, [builder.mul(loop.index, _number(2 * STEP))])
            b_at = builder.gep(b, [builder.mul(loop.index, builder.mul(b_bytes, _number(16)))])
            for tile, data, stride in (
                (4, a_at, a_bytes),
                (5, builder.gep(a_at, [builder.mul(a_bytes, _number(16))]), a_bytes),
                (6, b_at, b_bytes),
                (7, builder.gep(b_at, [_number(64)]), b_bytes),
            ):
                _call(builder, "tileloadd64", _tile(tile), data, stride)
            for tile in range(4):
                _call(builder, "tdpbf16ps", _tile(tile), _tile(4 + tile // 2), _tile(6 + tile % 2))
        for tile in range(4):
            corner = builder.add(builder.mul(out_bytes, _number(tile // 2 * 16)), _number(tile % 2 * 64))
            _call(builder, "tilestored64", _tile(tile), builder.gep(out, [corner]), out_bytes)
        return context.get_dummy_value()

    place = types.int64
    return types.void(rows_nD, place, pairs_PC, place, out_nC, place, place), codegen


@vector_code
def round_32(typingctx: Any, out_nC: Any, row: Any, keys_nC: Any, key_row: Any, at: Any) -> Any:
    """Write 32 products (float32 bits) as bf16 bits, half away from zero."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, out_bytes = _matrix(context, builder, signature.args[0], args[0], 4)
        keys, key_bytes = _matrix(context, builder, signature.args[2], args[2], 2)
        half, halves = ir.VectorType(_I32, 16), []
        for start in (0, 64):
            place = builder.gep(out, [builder.add(builder.mul(args[1], out_bytes), _number(start))])
            bits = builder.load(builder.bitcast(place, half.as_pointer()), align=4)
            bits = builder.add(bits, ir.Constant(half, [0x8000] * 16))
            halves.append(builder.bitcast(bits, ir.VectorType(_I16, 32)))
        upper = ir.Constant(ir.VectorType(_I32, 32), [2 * lane + 1 for lane in range(32)])
        place = builder.add(builder.mul(args[3], key_bytes), builder.mul(args[4], _number(2)))
        vector = ir.VectorType(_I16, 32).as_pointer()
        key = builder.bitcast(builder.gep(keys, [place]), vector)
        builder.store(builder.shuffle_vector(*halves, upper), key, align=2)
        return context.get_dummy_value()

    return types.void(out_nC, types.int64, keys_nC, types.int64, types.int64), codegen


def _matrix(context: Any, builder: Any, array_type: Any, array: Any, size: int) -> tuple[Any, Any]:
    """Address of a contiguous matrix, and the bytes of a row."""
    view = context.make_array(array_type)(context, builder, array)
    width = cgutils.unpack_tuple(builder, view.shape, 2)[1]
    return builder.bitcast(view.data, _BYTES), builder.mul(width, _number(size))


def _call(builder: Any, name: str, *args: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


def _tile(number: int) -> Any:
    return ir.Constant(_I8, number)


def _number(value: int) -> Any:
    return ir.Constant(_I64, value)
