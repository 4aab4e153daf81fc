"""Scaling and crop on a GPU for pictures of any sizes at once, byte for byte Pillow's (`resampling`)."""

# B pictures in N slots of S bytes, H height, W width; a pass takes (P, I, Q) to (P, O, Q): P lines before
# the axis, I pixels and then O along it, Q bytes behind it

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from prerank_tools.encoders.pictures import Cut
from prerank_tools.encoders.resampling import BITS, columns_first, order_of, taps

BLOCK = 1024
Size = tuple[int, int]  # width, height
Pass = tuple[int, int, int, int, int, int, int, int]  # from, to (bytes), P, I, O, Q, taps' place, K


def cut_pictures(
    slots_NS: np.ndarray,
    pictures: Sequence[tuple[int, Size | None]],
    cut: Cut,
    send: Callable[[np.ndarray], Tensor],
) -> Tensor:
    """uint8 (B, H, W, 3) of pictures: the slot of each, and its size or None where it was cut before.

    `send` moves an array to the GPU.
    """
    height, width = cut.crop or cut.size  # type: ignore[misc]
    plan = Plan(cut)
    for slot, size in pictures:
        plan.add(slot * slots_NS.shape[1], size or (width, height), is_cut=size is None)
    both = [np.array(passes, np.int64) for passes in (plan.first, plan.second)]
    tables, *sent = (send(array) for array in (np.concatenate(plan.tables), *both))
    slots = send(slots_NS)  # the last: small copies would wait behind these megabytes
    between = slots.new_empty(plan.between)
    out = slots.new_empty((len(pictures), height, width, 3))
    for x, y, passes_B8, sent_B8 in zip((slots, between), (between, out), both, sent, strict=True):
        largest = int((passes_B8[:, 2] * passes_B8[:, 4] * passes_B8[:, 5]).max())
        blocks = (triton.cdiv(largest, BLOCK), len(passes_B8))
        _scale[blocks](x, y, tables, sent_B8, BITS=BITS, BLOCK=BLOCK)
    return out


@dataclass
class Plan:
    """Both passes of every picture, and tables of their taps: for each output its first pixel and weights."""

    cut: Cut
    first: list[Pass] = field(default_factory=list)
    second: list[Pass] = field(default_factory=list)
    tables: list[np.ndarray] = field(default_factory=list)
    between: int = 0  # bytes from the first passes to the second ones
    _length: int = 0
    _written: int = 0
    _places: dict[tuple[int, int, int], tuple[int, int]] = field(default_factory=dict)

    def add(self, at: int, size: Size, *, is_cut: bool) -> None:
        """One picture whose bytes begin `at`; one that is cut passes as it is."""
        (width, height), crop = size, None if is_cut else self.cut.crop
        scaled_w, scaled_h = size if is_cut else self.cut.scaled(width, height)
        out_h, out_w = crop or (scaled_h, scaled_w)
        along_w, along_h = self._taps(width, scaled_w, out_w), self._taps(height, scaled_h, out_h)
        to, middle = self._written, self.between
        if order_of(self.cut.resample) == "by_size" and columns_first(width, height, scaled_w, scaled_h):
            self.first.append((at, middle, 1, height, out_h, width * 3, *along_h))
            self.second.append((middle, to, out_h, width, out_w, 3, *along_w))
            self.between += out_h * width * 3
        else:
            self.first.append((at, middle, height, width, out_w, 3, *along_w))
            self.second.append((middle, to, 1, height, out_h, out_w * 3, *along_h))
            self.between += height * out_w * 3
        self._written += out_h * out_w * 3

    def _taps(self, length: int, scaled: int, out: int) -> tuple[int, int]:
        """Where the table of the `out` middle ones of `scaled` pixels begins, and its number of taps."""
        key = (length, scaled, out)
        if key not in self._places:
            found, start = taps(length, scaled, self.cut.resample), (scaled - out) // 2
            table = np.column_stack([found.first_O, found.weights_OK])[start : start + out]
            self._places[key] = (self._length, found.weights_OK.shape[1])
            self.tables.append(table.ravel())
            self._length += table.size
        return self._places[key]


@triton.jit
def _scale(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    table_ptr: tl.tensor,
    plan_ptr: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    plan = plan_ptr + tl.program_id(1) * 8
    source, target = tl.load(plan), tl.load(plan + 1)
    lines = tl.load(plan + 2).to(tl.int32)
    length = tl.load(plan + 3).to(tl.int32)
    outputs = tl.load(plan + 4).to(tl.int32)
    behind = tl.load(plan + 5).to(tl.int32)
    place = tl.load(plan + 6)
    count = tl.load(plan + 7).to(tl.int32)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < lines * outputs * behind
    q, o, line = e % behind, e // behind % outputs, e // (behind * outputs)
    row = table_ptr + place + o * (count + 1)
    first = tl.load(row, inside, 0)
    total = tl.full((BLOCK,), 1 << (BITS - 1), tl.int32)
    for k in range(count):
        # A tap past the end has no weight, but must not be read from the next line either.
        at = tl.minimum(first + k, length - 1)
        pixel = tl.load(x_ptr + source + (line * length + at) * behind + q, inside, 0).to(tl.int32)
        total += pixel * tl.load(row + 1 + k, inside, 0)
    value = tl.minimum(tl.maximum(total >> BITS, 0), 255)
    tl.store(y_ptr + target + e, value.to(tl.uint8), inside)
