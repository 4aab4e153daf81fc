"""Pictures: decode what may be decoded, say why the rest may not, cut to size. No torch: it starts fast."""

# H height, W width, C channels

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Raster formats with a decoder inside Pillow itself: EPS and the like would start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
LONGEST_RATIO = 100  # a 1 x 100,000 strip would be scaled up to a picture of gigabytes

Source = bytes | Callable[[], bytes]


class ImageError(ValueError):
    """Why one image cannot be used; the text is the quarantine's `reason`."""


@dataclass(frozen=True)
class Limits:
    """The largest picture, in pixels and in bytes of its file."""

    max_pixels: int = 64_000_000
    max_bytes: int = 64 << 20


@dataclass(frozen=True)
class Cut:
    """From an RGB picture to a model's pixels: scaled, then cropped.

    To `size` (height, width), or to that length of the shorter edge, by the filter of Pillow's number
    `resample`; `crop` (height, width) is taken from the middle.
    """

    size: tuple[int, int] | int
    resample: int
    crop: tuple[int, int] | None = None

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """uint8 (H, W, 3)."""
        width, height = self.scaled(*picture.size)
        if (width, height) != picture.size:
            picture = picture.resize((width, height), Image.Resampling(self.resample))
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            picture = picture.crop((left, top, left + self.crop[1], top + self.crop[0]))
        return np.asarray(picture)

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """Width and height before the crop."""
        if isinstance(self.size, tuple):
            return self.size[1], self.size[0]
        long = int(self.size * max(width, height) / min(width, height))
        return (self.size, long) if width <= height else (long, self.size)


def load(image: Source) -> bytes:
    """The bytes of an image that is at hand or still on disk."""
    return image if isinstance(image, bytes) else image()


def decode(data: bytes, *, max_pixels: int, max_bytes: int = 64 << 20) -> Image.Image:
    """One RGB picture, upright, transparency on white, the first frame of an animation.

    Raises ImageError where the bytes are no picture, a cut one, or one too large to be a product photo; the
    header is looked at before anything is decompressed.
    """
    if not data:
        raise ImageError("image is empty")
    if len(data) > max_bytes:
        raise ImageError(f"image of {len(data)} bytes, more than {max_bytes}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            check_size(*picture.size, max_pixels=max_pixels)
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return to_rgb(picture)
    except ImageError:
        raise
    except Image.DecompressionBombError as fault:
        raise ImageError(f"image has more than {max_pixels} pixels") from fault
    except Exception as fault:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError ... on bad bytes.
        raise ImageError(f"image cannot be decoded ({one_line(fault)})") from fault


def check_size(width: int, height: int, *, max_pixels: int) -> None:
    """Refuse decompression bombs and strips by the header alone."""
    if width * height > max_pixels:
        raise ImageError(f"image of {width} x {height}, more than {max_pixels} pixels")
    if max(width, height) > LONGEST_RATIO * min(width, height):
        raise ImageError(f"image of {width} x {height}, more than {LONGEST_RATIO} times as long as wide")


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, since black would be read as part of the product."""
    if picture.mode.startswith("I"):  # 16 bits of grey
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def one_line(fault: Exception) -> str:
    """The first line of an exception without the address of the buffer, which changes from run to run."""
    text = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
    return "not a picture" if "cannot identify image" in text else text[:120]


def read_below(root: Path, name: str, max_bytes: int) -> bytes:
    """The bytes of a regular file below `root`; links are followed first, and may not lead out of it."""
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise ImageError("image_path leads out of --image-root")
        if not path.is_file():
            raise ImageError(f"image_path {name}: no such file")
        if path.stat().st_size > max_bytes:
            raise ImageError(f"image_path {name}: larger than {max_bytes} bytes")
        return path.read_bytes()
    except ImageError:
        raise
    except (OSError, ValueError, RuntimeError) as fault:  # a NUL in the name, a loop of links
        raise ImageError(f"image_path {name[:80]!r}: cannot be read") from fault
