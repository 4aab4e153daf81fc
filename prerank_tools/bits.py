"""Bits of a mask in compiled loops, one machine instruction each."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from prerank_tools.compiled import vector_code


@vector_code
def set_bits(typingctx: Any, bits: Any) -> Any:
    """How many bits are set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.int64), codegen


@vector_code
def lowest_bit(typingctx: Any, bits: Any) -> Any:
    """Index of the lowest set bit."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


@vector_code
def highest_bit(typingctx: Any, bits: Any) -> Any:
    """Index of the highest set bit."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sub(
            ir.Constant(ir.IntType(64), 63), builder.ctlz(args[0], ir.Constant(ir.IntType(1), 1))
        )

    return types.int64(types.int64), codegen
