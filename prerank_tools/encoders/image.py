"""Image vectors: decode what may be decoded, say why the rest may not, and run a vision model over it."""

# N images, B images in a batch, C channels, H height, W width, I image dims

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import normalize

from prerank_tools.encoders.batches import ahead
from prerank_tools.encoders.tower import GPU_FACTOR, InPieces, Tower, no_log, resolve_precision

# Raster formats with a decoder inside Pillow itself: EPS and the like would start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
LONGEST_RATIO = 100  # a 1 x 100,000 strip would be scaled up to a picture of gigabytes

Source = bytes | Callable[[], bytes]


class ImageError(ValueError):
    """Why one image cannot be used; the text is the quarantine's `reason`."""


class ImageTower(Tower):
    """A vision model and its pooling: pixels (B, C, H, W) -> x_BI in fp32, not normalised."""

    def __init__(self, model: nn.Module, pooling: Literal["pooler", "cls", "mean"], *, dim: int) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.dim = dim

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        out = self.model(pixel_values=pixels_BCHW)
        if self.pooling == "pooler":
            return out.pooler_output.flatten(1).float()
        hidden = out.last_hidden_state.float()
        if hidden.dim() == 4:  # a convolutional map (B, I, h, w)
            return hidden.mean(dim=(2, 3))
        return hidden[:, 0] if self.pooling == "cls" else hidden.mean(dim=1)


class ImageEncoder:
    """A tower ready to encode: decoding, preprocessing, batching, precision and device.

    `pixels_of` turns RGB pictures into a float32 array (B, C, H, W). With `exact`, every batch has the same
    shape, so that an image's bytes do not depend on how many others there are. A batch that does not fit in
    memory runs in halves; `log` is told.
    """

    def __init__(
        self,
        tower: Tower,
        pixels_of: Callable[[list[Image.Image]], np.ndarray],
        *,
        batch: int = 32,
        max_pixels: int = 64_000_000,
        max_bytes: int = 64 << 20,
        precision: str = "auto",
        exact: bool = False,
        compiled: bool = False,
        device: str = "cpu",
        threads: int = 2,
        log: Callable[..., None] = no_log,
    ) -> None:
        self.exact = exact
        self.device = torch.device(device)
        self.batch = batch * GPU_FACTOR if self.device.type == "cuda" else batch
        self.dtype = resolve_precision(precision, self.device)
        self.tower = tower.eval().to(self.device, self.dtype)
        self.tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._tower = torch.compile(self.tower) if compiled else self.tower
        self._in_pieces = InPieces(self.forward, log)
        self.dim = tower.dim
        self._pixels_of = pixels_of
        self._threads = threads
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes

    def encode(self, sources: Sequence[Source]) -> tuple[np.ndarray, list[str | None]]:
        """Unit vectors x_NI in float32 and, per image, the reason why it has none (its row is zero then)."""
        x_NI = np.zeros((len(sources), self.dim), np.float32)
        faults: list[str | None] = [None] * len(sources)
        starts = range(0, len(sources), self.batch)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:

            def prepare(start: int) -> tuple[list[int], np.ndarray | None]:
                return self._prepare(sources, start, pool, faults)

            for _, (rows, pixels) in ahead(starts, prepare):
                if pixels is not None:
                    x_NI[rows] = self._in_pieces(torch.from_numpy(pixels))[: len(rows)].cpu().numpy()
        return x_NI, faults

    def _prepare(
        self, sources: Sequence[Source], start: int, pool: ThreadPoolExecutor, faults: list[str | None]
    ) -> tuple[list[int], np.ndarray | None]:
        """Rows and pixels of one batch; faults are noted, and their images left out."""
        chunk = sources[start : start + self.batch]
        decoded = list(pool.map(lambda source: self._one(source), chunk))
        rows, pixels = [], []
        for row, found in enumerate(decoded, start):
            if isinstance(found, str):
                faults[row] = found
            else:
                rows.append(row)
                pixels.append(found)
        if not pixels:
            return rows, None
        if self.exact:
            pixels += [np.zeros_like(pixels[0])] * (self.batch - len(pixels))
        return rows, np.stack(pixels)

    def _one(self, source: Source) -> np.ndarray | str:
        try:
            data = source if isinstance(source, bytes) else source()
            picture = decode(data, max_pixels=self._max_pixels, max_bytes=self._max_bytes)
            return self._pixels_of([picture])[0]
        except ImageError as fault:
            return str(fault)

    @torch.inference_mode()
    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Unit vectors (B, I) of one batch, on the device."""
        pixels = pixels_BCHW.to(self.device, self.dtype, memory_format=torch.channels_last)
        return normalize(self._tower(pixels), dim=-1)


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
            return to_rgb(ImageOps.exif_transpose(picture))
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
    return picture.convert("RGB")


def one_line(fault: Exception) -> str:
    """The first line of an exception without the address of the buffer, which changes from run to run."""
    text = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
    return "not a picture" if "cannot identify image" in text else text[:120]
