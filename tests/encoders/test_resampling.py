"""Pillow's scaling in its own integers: every byte, at every size, and on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prerank_tools.encoders.pictures import Cut
from prerank_tools.encoders.resampling import columns_first, order_of, scale

FILTERS = [int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)]
SIDE = st.integers(1, 90)


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Half of it black or white, where rounding and cutting show most."""
    rng = np.random.default_rng([width, height, seed])
    x_HWC = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(rng.random(x_HWC.shape) < 0.5, x_HWC, np.uint8(255) * (x_HWC > 127))


@settings(deadline=None, max_examples=150)
@given(SIDE, SIDE, st.integers(1, 60), st.integers(1, 60), st.sampled_from(FILTERS))
def test_the_bytes_are_those_of_pillow(
    width: int, height: int, out_w: int, out_h: int, resample: int
) -> None:
    x_HWC = noise(width, height)
    by_size = order_of(resample) == "by_size" and columns_first(width, height, out_w, out_h)
    ours = scale(x_HWC, (out_h, out_w), resample, rows_first=not by_size)
    theirs = Image.fromarray(x_HWC).resize((out_w, out_h), Image.Resampling(resample))
    if max(width, height) <= 100 * min(width, height):  # Pillow has another way for strips, which are refused
        assert ours.tobytes() == np.asarray(theirs).tobytes()


def test_a_filter_that_is_not_written_here_is_not_taken() -> None:
    assert order_of(int(Image.Resampling.LANCZOS)) is None
    assert all(order_of(resample) is not None for resample in FILTERS)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "cut", [Cut((24, 20), 3), Cut((24, 20), 2), Cut(30, 3, (24, 20)), Cut(24, 3, (24, 24))]
)
def test_a_gpu_cuts_pictures_of_all_sizes_to_the_bytes_of_pillow(cut: Cut) -> None:
    from prerank_tools.encoders.scaling_triton import cut_pictures

    slots_NS, pictures, expected = np.zeros((12, 60 * 60 * 3), np.uint8), [], []
    for slot, (width, height) in enumerate(np.random.default_rng(0).integers(8, 60, (12, 2)).tolist()):
        x_HWC = noise(width, height)
        expected.append(cut(Image.fromarray(x_HWC)))
        kept = x_HWC if slot % 3 else expected[-1]
        pictures.append((slot, (width, height) if slot % 3 else None))
        slots_NS[slot, : kept.size] = kept.ravel()
    found = cut_pictures(slots_NS, pictures[::-1], cut, lambda x: torch.from_numpy(x).cuda()).cpu().numpy()
    assert found[::-1].tobytes() == np.stack(expected).tobytes()
