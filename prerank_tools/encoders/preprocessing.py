"""A model's preprocessing in two steps: a cut to 8-bit pixels, and a table from their values to floats."""

# B images, C channels, H height, W width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from prerank_tools.encoders.pictures import Cut

TRIAL_SIZES = ((64, 64), (301, 200), (97, 413), (800, 600), (224, 224))


@dataclass(frozen=True)
class Preprocessing:
    """RGB pictures -> float32 (B, C, H, W). `values_CV` (3, 256) is the float of each 8-bit value.

    The cut can be made in another process and the table looked up on a GPU: a picture travels as bytes.
    """

    cut: Cut
    values_CV: np.ndarray

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        cut_BHWC = np.stack([self.cut(picture) for picture in pictures])
        return np.stack([row_V[cut_BHWC[..., c]] for c, row_V in enumerate(self.values_CV)], axis=1)


def split(processor: Any) -> Preprocessing | None:
    """The two steps of a transformers image processor; None where they would not give its very bytes.

    The steps are read off its settings and tried on noise of several shapes: a processor that does anything
    else is left as it is.
    """
    cut = cut_of(processor)
    if cut is None:
        return None
    found = Preprocessing(cut, table_of(processor, cut))
    rng = np.random.default_rng(0)
    for width, height in TRIAL_SIZES:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        ours, theirs = found([picture]), pixel_values(processor, [picture])
        if ours.shape != theirs.shape or ours.tobytes() != theirs.tobytes():
            return None
    return found


def pixel_values(processor: Any, pictures: Sequence[Image.Image]) -> np.ndarray:
    """What the processor itself makes of pictures: float32 (B, C, H, W)."""
    return processor(images=list(pictures), return_tensors="np")["pixel_values"].astype(np.float32)


def cut_of(processor: Any) -> Cut | None:
    """Scaling and crop by the processor's settings; None where its pictures would not be of one size."""
    size, crop = dict(getattr(processor, "size", None) or {}), None
    if getattr(processor, "do_center_crop", None):
        cropped = dict(processor.crop_size)
        crop = (int(cropped["height"]), int(cropped["width"]))
    if not getattr(processor, "do_resize", False):
        return None
    if size.get("height") and size.get("width"):
        edges = (int(size["height"]), int(size["width"]))
        target: tuple[int, int] | int = edges
    elif size.get("shortest_edge") and not size.get("longest_edge") and crop:
        target = int(size["shortest_edge"])
        edges = (target, target)
    else:
        return None
    if crop and (crop[0] > edges[0] or crop[1] > edges[1]):
        return None
    return Cut(target, int(processor.resample), crop)


def table_of(processor: Any, cut: Cut) -> np.ndarray:
    """The float of every 8-bit value and channel (3, 256), seen on a picture that is not scaled."""
    height, width = cut.size if isinstance(cut.size, tuple) else (cut.size, cut.size)
    # Every value comes within any 16 x 16 pixels, so also within the crop.
    ramp_HW = (np.arange(width)[None] + 16 * np.arange(height)[:, None]).astype(np.uint8)
    picture = Image.fromarray(np.repeat(ramp_HW[..., None], 3, axis=2))
    values_CHW, cut_HWC = pixel_values(processor, [picture])[0], cut(picture)
    table_CV = np.zeros((3, 256), np.float32)
    for c in range(3):
        table_CV[c, cut_HWC[..., c]] = values_CHW[c]
    return table_CV
