"""Image vectors: pictures decoded beside the forward pass, and a vision model run over them in batches."""

# N images, B images in a batch, C channels, H height, W width, V 8-bit values, I image dims

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from prerank_tools.encoders.decoding import Decoder, Into, shared_bytes
from prerank_tools.encoders.pictures import Limits, Source
from prerank_tools.encoders.preprocessing import Preprocessing
from prerank_tools.encoders.tower import GPU_FACTOR, InPieces, Tower, no_log, resolve_precision

Started = tuple[int, list[Future[list[str | None]]]]  # the first slot of a batch, and who fills the slots
Decoded = tuple[np.ndarray, list[str | None]]  # the slots of a batch, and why some hold no picture
AHEAD = 3  # batches of pictures in the buffer: one in the forward pass, the others being decoded


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
    memory runs in halves; `log` is told. `threads` pictures are decoded at once, for a GPU in processes.
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
        self._limits = Limits(max_pixels, max_bytes)
        self._decoder: Decoder | None = None
        self._copied = torch.cuda.Event() if self.device.type == "cuda" else None
        self._values_CV: Tensor | None = None
        if isinstance(pixels_of, Preprocessing):
            self._values_CV = torch.from_numpy(pixels_of.values_CV).to(self.device, self.dtype)

    def encode(self, sources: Sequence[Source]) -> tuple[np.ndarray, list[str | None]]:
        """Unit vectors x_NI in float32 and, per image, the reason why it has none (its row is zero then)."""
        x_NI = np.zeros((len(sources), self.dim), np.float32)
        faults: list[str | None] = []
        rows: list[int] = []
        parts: list[Tensor] = []  # on the device: a copy after each batch would wait for it
        for pixels, reasons in self._batches(sources):
            good = [n for n, reason in enumerate(reasons) if reason is None]
            rows += [len(faults) + n for n in good]
            faults += reasons
            if good:
                parts.append(self._in_pieces(self._batch_of(pixels, good))[: len(good)])
        if parts:
            x_NI[rows] = torch.cat(parts).cpu().numpy()
        return x_NI, faults

    def _batches(self, sources: Sequence[Source]) -> Iterator[Decoded]:
        """Slots and reasons of each batch while the next ones are decoded; slots are used again then."""
        decoder = self._decoder = self._decoder or self._open()
        slots = decoder.into.array()
        waiting: deque[Started] = deque()
        for number, start in enumerate(range(0, len(sources), self.batch)):
            if len(waiting) == AHEAD:
                yield self._wait(decoder, slots, waiting)
                self._sent()
            chunk, first = sources[start : start + self.batch], number % AHEAD * self.batch
            waiting.append((first, decoder.start(first, chunk)))
        while waiting:
            yield self._wait(decoder, slots, waiting)

    def _wait(self, decoder: Decoder, slots: np.ndarray, waiting: deque[Started]) -> Decoded:
        first, started = waiting.popleft()
        reasons = decoder.wait(started)
        return slots[first : first + len(reasons)], reasons

    def _sent(self) -> None:
        """Until the GPU has read the last batch's slots."""
        if self._copied is not None:
            self._copied.synchronize()

    def _open(self) -> Decoder:
        """The decoder and its buffer; one picture's shape is found by cutting one."""
        of, blank = self._pixels_of, Image.new("RGB", (64, 64))
        one = of.cut if isinstance(of, Preprocessing) else lambda picture: of([picture])[0]
        sample = one(blank)
        # A processor that is no cut and table cannot be handed to another process.
        processes = self.device.type == "cuda" and isinstance(of, Preprocessing)
        size = AHEAD * self.batch * sample.nbytes
        buffer = shared_bytes(size) if processes else bytearray(size)
        into = Into(buffer, (AHEAD * self.batch, *sample.shape), sample.dtype.str, one, self._limits)
        if self.device.type == "cuda":
            pin(self, into.array())
        return Decoder(into, self._threads, processes)

    def _batch_of(self, pixels: np.ndarray, good: list[int]) -> Tensor:
        """The decoded pictures of a batch, filled up to the fixed shape where `exact`."""
        if len(good) < len(pixels):
            pixels = pixels[good]
        if self.exact and len(pixels) < self.batch:
            pixels = np.concatenate(
                [pixels, np.zeros((self.batch - len(pixels), *pixels.shape[1:]), pixels.dtype)]
            )
        return torch.from_numpy(pixels)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Unit vectors (B, I) of one batch, on the device; from floats (B, C, H, W) or bytes (B, H, W, C)."""
        pixels = pixels.to(self.device, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if pixels.dtype == torch.uint8:
            pixels = self._floats(pixels)
        pixels = pixels.to(self.dtype, memory_format=torch.channels_last)
        return normalize(self._tower(pixels), dim=-1)

    def _floats(self, pixels_BHWC: Tensor) -> Tensor:
        """The float of each byte, (B, C, H, W)."""
        assert self._values_CV is not None
        first_C = torch.arange(len(self._values_CV), device=self.device, dtype=torch.int32) * 256
        return self._values_CV.flatten()[pixels_BHWC.int() + first_C].permute(0, 3, 1, 2)


def pin(owner: object, array: np.ndarray) -> None:
    """Lock an array's pages for the time its owner lives: the GPU then copies them without the processor."""
    cuda = torch.cuda.cudart()
    if int(cuda.cudaHostRegister(array.ctypes.data, array.nbytes, 0)) == 0:
        weakref.finalize(owner, cuda.cudaHostUnregister, array.ctypes.data)
