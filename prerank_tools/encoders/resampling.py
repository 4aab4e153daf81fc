"""Pillow's scaling of 8-bit pictures in its own integers, so that another processor gives the same bytes.

Pillow scales along one axis and then along the other. Each pass is a sum of pixels times weights of 22 bits,
rounded and cut to 8 bits (Pillow's `Resample.c`); the weights follow from the two lengths and the filter.
"""

# H height, W width, C channels, O outputs along an axis, K taps

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

BITS = 22  # of a weight behind the point


@dataclass(frozen=True)
class Taps:
    """Of each output: the first input pixel `first_O`, and int32 `weights_OK` of it and those behind it."""

    first_O: np.ndarray
    weights_OK: np.ndarray


def bilinear(x: np.ndarray) -> np.ndarray:
    """A triangle of two pixels' width."""
    x = np.abs(x)
    return np.where(x < 1, 1 - x, 0.0)


def bicubic(x: np.ndarray) -> np.ndarray:
    """The cubic with a = -0.5, of four pixels' width; operations in Pillow's order."""
    x, a = np.abs(x), -0.5
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


FILTERS: dict[int, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    int(Image.Resampling.BILINEAR): (bilinear, 1.0),
    int(Image.Resampling.BICUBIC): (bicubic, 2.0),
}


@lru_cache(maxsize=4096)
def taps(length: int, out: int, resample: int) -> Taps:
    """The taps of one pass from `length` to `out` pixels."""
    curve, reach = FILTERS[resample]
    scale = length / out
    wider = max(scale, 1.0)
    support, count = reach * wider, math.ceil(reach * wider) * 2 + 1
    centre_O = (np.arange(out) + 0.5) * scale
    first_O = np.maximum((centre_O - support + 0.5).astype(np.int64), 0)
    size_O = np.minimum((centre_O + support + 0.5).astype(np.int64), length) - first_O
    k = np.arange(count)
    w_OK = curve((k + first_O[:, None] - centre_O[:, None] + 0.5) * (1.0 / wider))
    w_OK = np.where(k < size_O[:, None], w_OK, 0.0)
    total_O = np.zeros(out)
    for column in w_OK.T:  # one after the other: a sum in pairs could round to another weight
        total_O += column
    w_OK = w_OK / np.where(total_O == 0, 1.0, total_O)[:, None]
    whole_OK = np.where(w_OK < 0, -0.5, 0.5) + w_OK * (1 << BITS)
    return Taps(first_O.astype(np.int32), whole_OK.astype(np.int32))


def columns_first(width: int, height: int, out_width: int, out_height: int) -> bool:
    """Is this a size at which Pillow scales along the columns first? From 13 on; found by trial, not written.

    Before, it always began with the rows; `order_of` tells which Pillow is at hand.
    """
    return height > out_height and height - out_height > 2 * (width - out_width)


def scale(x_HWC: np.ndarray, out: tuple[int, int], resample: int, *, rows_first: bool) -> np.ndarray:
    """The picture (height, width, C) at `out` (height, width), in numpy."""
    along_h, along_w = taps(x_HWC.shape[0], out[0], resample), taps(x_HWC.shape[1], out[1], resample)
    if rows_first:
        return scale_columns(scale_rows(x_HWC, along_w), along_h)
    return scale_rows(scale_columns(x_HWC, along_h), along_w)


def scale_columns(x_HWC: np.ndarray, along: Taps) -> np.ndarray:
    """One pass over the first axis."""
    return scale_rows(x_HWC.transpose(1, 0, 2), along).transpose(1, 0, 2)


def scale_rows(x_HWC: np.ndarray, along: Taps) -> np.ndarray:
    """One pass over the second axis."""
    total = np.full((len(x_HWC), len(along.first_O), x_HWC.shape[2]), 1 << (BITS - 1), np.int32)
    for k in range(along.weights_OK.shape[1]):
        at_O = np.minimum(along.first_O + k, x_HWC.shape[1] - 1)
        total += x_HWC[:, at_O].astype(np.int32) * along.weights_OK[:, k, None]
    return np.clip(total >> BITS, 0, 255).astype(np.uint8)


@lru_cache(maxsize=64)
def order_of(resample: int) -> str | None:
    """Which order the Pillow at hand keeps: "rows", "by_size" (`columns_first`), None where neither fits.

    Tried on noise: None also means that this Pillow's arithmetic is another one.
    """
    if resample not in FILTERS:
        return None
    found, out = {"rows", "by_size"}, (32, 40)
    rng = np.random.default_rng(0)
    for tall, wide in ((0.5, 0.7), (1.5, 0.8), (1.6, 1.2), (1.7, 1.6), (3.0, 1.1), (0.8, 2.5), (1.1, 1.1)):
        height, width = int(out[0] * tall), int(out[1] * wide)
        x_HWC = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        true = np.asarray(Image.fromarray(x_HWC).resize(out[::-1], Image.Resampling(resample))).tobytes()
        by_size = columns_first(width, height, out[1], out[0])
        for name, rows_first in (("rows", True), ("by_size", not by_size)):
            if scale(x_HWC, out, resample, rows_first=rows_first).tobytes() != true:
                found.discard(name)
    return min(found, default=None)
