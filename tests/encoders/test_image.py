"""Images: what is decoded and how, what is refused and why, and the vectors against plain transformers."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTModel

from prerank_tools.encoders.image import ImageEncoder
from prerank_tools.encoders.loading import EmbedConfig, load_image
from prerank_tools.encoders.pictures import ImageError, decode
from prerank_tools.encoders.settings import ImageConfig
from tests.encoders import tiny_models


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def solid(colour: str, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def corner(data: bytes) -> tuple[int, ...]:
    return decode(data, max_pixels=10_000).getpixel((0, 0))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_common_formats_decode_to_rgb(kind: str) -> None:
    picture = decode(encoded(solid("red"), kind), max_pixels=10_000)
    assert picture.mode == "RGB" and picture.size == (40, 30)
    assert np.abs(np.array(picture.getpixel((5, 5))) - (255, 0, 0)).max() <= 3


def test_transparent_becomes_white() -> None:
    assert corner(encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0)))) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    grey = Image.fromarray(np.full((9, 9), 0x8000, np.uint16))
    assert corner(encoded(grey)) == (128, 128, 128)


def test_a_photo_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    assert decode(encoded(solid("red"), "JPEG", exif=exif), max_pixels=10_000).size == (30, 40)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not a picture at all", "cannot be decoded"),
        (encoded(solid("red"), "JPEG")[:200], "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
        (png_header(60_000, 60_000), "pixels"),
        (png_header(30_000, 1_000), "more than 10000 pixels"),
        (encoded(solid("red", (2_000, 4))), "100 times as long"),
    ],
)
def test_what_cannot_be_used_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data, max_pixels=10_000)


def test_too_many_bytes_are_not_even_looked_at() -> None:
    with pytest.raises(ImageError, match="more than 10"):
        decode(b"x" * 11, max_pixels=100, max_bytes=10)


COLOURS = ["red", "green", "blue", "white", "black", "orange", "pink"]
PICTURES = [encoded(solid(colour, (50, 20 + 3 * n))) for n, colour in enumerate(COLOURS)]


def vit(folder: Path, *, exact: bool = False, batch: int = 3, **image: object) -> ImageEncoder:
    config = EmbedConfig(precision="fp32", exact_batches=exact, image=ImageConfig(batch=batch, **image))
    return load_image(tiny_models.vit(folder), config, device="cpu", threads=2)


@pytest.mark.parametrize("exact", [False, True])
def test_vit_equals_plain_transformers(tmp_path: Path, exact: bool) -> None:
    x_NI, faults = vit(tmp_path, exact=exact).encode(PICTURES)
    model, processor = ViTModel.from_pretrained(tmp_path).eval(), AutoImageProcessor.from_pretrained(tmp_path)
    with torch.inference_mode():
        pictures = [Image.open(io.BytesIO(data)) for data in PICTURES]
        pixels = [processor(images=[picture], return_tensors="pt")["pixel_values"] for picture in pictures]
        y_NI = torch.cat([model(pixel_values=p).last_hidden_state[:, 0] for p in pixels])
    np.testing.assert_allclose(x_NI, torch.nn.functional.normalize(y_NI, dim=-1).numpy(), atol=2e-6)
    assert faults == [None] * 7


def test_a_pooler_that_is_not_in_the_weights_is_not_used(tmp_path: Path) -> None:
    """transformers would fill it with random numbers: two loads would give two spaces."""
    first, second = vit(tmp_path).encode(PICTURES)[0], vit(tmp_path).encode(PICTURES)[0]
    assert first.tobytes() == second.tobytes()


def test_faults_leave_their_neighbours_alone(tmp_path: Path) -> None:
    encoder = vit(tmp_path, exact=True)
    clean, _ = encoder.encode(PICTURES)
    x_NI, faults = encoder.encode([*PICTURES[:2], b"junk", *PICTURES[2:], b""])
    assert [n for n, fault in enumerate(faults) if fault] == [2, 8]
    assert np.delete(x_NI, [2, 8], axis=0).tobytes() == clean.tobytes()
    assert not x_NI[[2, 8]].any()


def test_exact_batches_do_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    encoder = vit(tmp_path, exact=True, batch=4)
    assert encoder.encode(PICTURES)[0][:2].tobytes() == encoder.encode(PICTURES[:2])[0].tobytes()
