"""Preprocessing as a cut and a table: the processor's own bytes, or the processor itself."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil

from prerank_tools.encoders.image import ImageEncoder
from prerank_tools.encoders.preprocessing import Preprocessing, pixel_values, split
from prerank_tools.encoders.settings import ImageConfig
from prerank_tools.encoders.transformers_models import image_tower
from tests.encoders import tiny_models


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(),
        ViTImageProcessorPil(size={"height": 48, "width": 32}, image_mean=[0.4, 0.5, 0.6]),
        CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 24}),
        SiglipImageProcessorPil(),
    ],
)
def test_a_cut_and_a_table_give_the_bytes_of_the_processor(processor: Any) -> None:
    found = split(processor)
    assert found is not None and found.cut(noise(40, 50)).dtype == np.uint8
    for size in ((40, 50), (500, 123), (31, 700), (224, 224)):
        assert found([noise(*size)]).tobytes() == pixel_values(processor, [noise(*size)]).tobytes()


class Inverted(ViTImageProcessorPil):
    """Does what no setting tells."""

    def rescale(self, image: np.ndarray, scale: float, **kwargs: Any) -> np.ndarray:
        return super().rescale(image[:, ::-1], scale, **kwargs)


@pytest.mark.parametrize(
    "processor",
    [
        Inverted(),
        ViTImageProcessorPil(do_resize=False),
        CLIPImageProcessorPil(do_center_crop=False),  # as many shapes as pictures
        CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 32, "width": 32}),  # padded
    ],
)
def test_any_other_processor_is_left_as_it_is(processor: Any) -> None:
    assert split(processor) is None


def test_a_processor_that_is_not_split_still_encodes(tmp_path: Path) -> None:
    tower, pixels_of = image_tower(tiny_models.vit(tmp_path), ImageConfig())
    assert isinstance(pixels_of, Preprocessing)
    whole = ImageEncoder(tower, lambda pictures: pixels_of(pictures), precision="fp32")
    parts = ImageEncoder(tower, pixels_of, precision="fp32")
    photos = [into_png(noise(30 + n, 40)) for n in range(5)]
    assert whole.encode(photos)[0].tobytes() == parts.encode(photos)[0].tobytes()


def into_png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
