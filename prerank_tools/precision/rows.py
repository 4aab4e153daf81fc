"""Row formats: turn embedding rows into one byte (or half a byte) a value with a scale per row, and back.

Values are symmetric INT8, FP8 e4m3fn or asymmetric UINT4; scales multiply (`value = code * scale + offset`).
"""

# N rows, D dims, W bytes a row

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

RowFormat = Literal["int8", "fp8", "uint4"]
FORMATS: tuple[RowFormat, ...] = ("int8", "fp8", "uint4")
# The name that goes into the file's footer says the arithmetic, not just the width.
FOOTER_NAMES: dict[RowFormat, str] = {
    "int8": "int8_symmetric_row",
    "fp8": "fp8_e4m3fn_row",
    "uint4": "uint4_row_scale_offset",
}
E4M3_MAX = 448.0
_SMALLEST_NORMAL = np.float32(2.0**-6)
_SUBNORMAL_STEPS = np.float32(2.0**9)
_SIGN, _NAN, _LARGEST = np.uint8(0x80), np.uint8(0x7F), np.uint8(0x7E)


@dataclass(frozen=True)
class Rows:
    """Packed rows: `codes_NW` (int8 for int8, else uint8), `scale_N` and, for uint4, `offset_N` (float32)."""

    format: RowFormat
    dim: int
    codes_NW: np.ndarray
    scale_N: np.ndarray
    offset_N: np.ndarray | None = None

    @property
    def bytes_a_row(self) -> int:
        """Codes and float32 scale and offset."""
        return self.codes_NW.shape[1] + 4 * (1 + (self.offset_N is not None))


def encode(x_ND: np.ndarray, *, format: RowFormat) -> Rows:
    """Pack finite rows; raises ValueError where a value is NaN or infinite."""
    x_ND = np.ascontiguousarray(x_ND, dtype=np.float32)
    if not np.isfinite(x_ND).all():
        raise ValueError("a value is NaN or infinite")
    return {"int8": _encode_int8, "fp8": _encode_fp8, "uint4": _encode_uint4}[format](x_ND)


def decode(rows: Rows) -> np.ndarray:
    """The float32 rows that a reader of the packed ones sees, (N, D)."""
    if rows.format == "fp8":
        return e4m3_to_float(rows.codes_NW) * rows.scale_N[:, None]
    if rows.format == "int8":
        return rows.codes_NW.astype(np.float32) * rows.scale_N[:, None]
    assert rows.offset_N is not None
    codes_ND = _unpack_nibbles(rows.codes_NW, rows.dim).astype(np.float32)
    return codes_ND * rows.scale_N[:, None] + rows.offset_N[:, None]


def _encode_int8(x_ND: np.ndarray) -> Rows:
    scale_N = _symmetric_scale(x_ND, 127.0)
    codes_ND = np.rint(x_ND / scale_N[:, None]).clip(-127, 127).astype(np.int8)
    return Rows("int8", x_ND.shape[1], codes_ND, scale_N)


def _encode_fp8(x_ND: np.ndarray) -> Rows:
    scale_N = _symmetric_scale(x_ND, E4M3_MAX)
    return Rows("fp8", x_ND.shape[1], float_to_e4m3(x_ND / scale_N[:, None]), scale_N)


def _encode_uint4(x_ND: np.ndarray) -> Rows:
    """FBGEMM's n-bit row-wise arithmetic: offset and scale are fp16 values, and are rounded before use."""
    low_N = x_ND.min(axis=1).clip(-65504, 65504).astype(np.float16).astype(np.float32)
    span_N = (x_ND.max(axis=1) - low_N).clip(0, 65504)
    scale_N = (span_N / np.float32(15)).astype(np.float16).astype(np.float32)
    scale_N[scale_N == 0] = 1
    codes_ND = np.rint((x_ND - low_N[:, None]) / scale_N[:, None]).clip(0, 15).astype(np.uint8)
    return Rows("uint4", x_ND.shape[1], _pack_nibbles(codes_ND), scale_N, low_N)


def _symmetric_scale(x_ND: np.ndarray, largest: float) -> np.ndarray:
    """Row maximum over the largest code; 1 for a zero row, so that it decodes to zeros."""
    scale_N = np.abs(x_ND).max(axis=1) / np.float32(largest)
    # Below the smallest normal float the quotient x / scale loses its bits, or divides by zero.
    return np.where(scale_N < np.finfo(np.float32).tiny, np.float32(1), scale_N).astype(np.float32)


def float_to_e4m3(x: np.ndarray) -> np.ndarray:
    """Float32 -> e4m3fn codes (uint8): ties to even, saturating at 448, NaN kept (there is no infinity)."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    magnitude = np.fmin(np.abs(x), np.float32(E4M3_MAX))  # fmin: NaN must not reach an integer cast
    bits = magnitude.view(np.uint32)
    # Drop 20 of 23 mantissa bits, half to even; a carry runs into the exponent, as it should.
    normal = ((bits + np.uint32(0x7FFFF) + ((bits >> 20) & 1)) >> 20).astype(np.int32) - (120 << 3)
    subnormal = np.rint(np.minimum(magnitude, _SMALLEST_NORMAL) * _SUBNORMAL_STEPS).astype(np.int32)
    codes = np.where(magnitude < _SMALLEST_NORMAL, subnormal, np.minimum(normal, _LARGEST)).astype(np.uint8)
    codes = np.where(np.isnan(x), _NAN, codes)
    return codes | np.where(np.signbit(x), _SIGN, np.uint8(0))


def e4m3_to_float(codes: np.ndarray) -> np.ndarray:
    """E4m3fn codes (uint8) -> float32, by table."""
    return _E4M3_VALUES[codes]


def _e4m3_values() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    value = np.where(code & 0x7F == 0x7F, np.nan, value)
    return np.where(code & 0x80, -value, value).astype(np.float32)


_E4M3_VALUES = _e4m3_values()


def _pack_nibbles(codes_ND: np.ndarray) -> np.ndarray:
    """Two codes a byte, the earlier dimension in the low half."""
    if codes_ND.shape[1] % 2:
        codes_ND = np.pad(codes_ND, ((0, 0), (0, 1)))
    return codes_ND[:, ::2] | (codes_ND[:, 1::2] << 4)


def _unpack_nibbles(codes_NW: np.ndarray, dim: int) -> np.ndarray:
    return np.stack([codes_NW & 15, codes_NW >> 4], axis=2).reshape(len(codes_NW), -1)[:, :dim]
