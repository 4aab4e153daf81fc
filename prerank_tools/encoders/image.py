"""Image vectors: pictures decoded beside the forward pass, and a vision model run over them in batches."""

# N images, B images in a batch, C channels, H height, W width, V 8-bit values, I image dims

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from importlib.util import find_spec
from itertools import chain, islice
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from prerank_tools.encoders.decoding import Decoder, Into, Outcome, shared_bytes
from prerank_tools.encoders.patches import multiply_patches
from prerank_tools.encoders.pictures import Limits, Source
from prerank_tools.encoders.preprocessing import Preprocessing
from prerank_tools.encoders.resampling import order_of
from prerank_tools.encoders.tower import (
    GPU_FACTOR,
    InPieces,
    Tower,
    compile_blocks,
    no_log,
    resolve_precision,
)
from prerank_tools.encoders.turns import turn_on

UNCUT = 4  # a slot holds this many times the bytes of a cut picture, where the GPU is to cut it

Started = tuple[int, list[Future[list[Outcome]]]]  # the first slot of a batch, and who fills the slots
Decoded = tuple[np.ndarray, list[Outcome]]  # the slots of a batch, and what is in them
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
        self.device = torch.device(device)
        self.batch = batch * GPU_FACTOR if self.device.type == "cuda" else batch
        self.dtype = resolve_precision(precision, self.device)
        self.tower = tower.eval().to(self.device, self.dtype)
        self.tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.device.type == "cuda":
            multiply_patches(self.tower)
        if compiled:
            compile_blocks(self.tower, dynamic=False)
        self._one_shape = exact or compiled
        self._in_pieces = InPieces(self.forward, log)
        self._turn = turn_on(self.device)
        self.dim = tower.dim
        self._pixels_of = pixels_of
        self._threads = threads
        self._limits = Limits(max_pixels, max_bytes)
        self._decoder: Decoder | None = None
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._cuts = self.device.type == "cuda" and can_cut_on_gpu(pixels_of)
        self._values_CV: Tensor | None = None
        if isinstance(pixels_of, Preprocessing):
            self._values_CV = torch.from_numpy(pixels_of.values_CV).to(self.device, self.dtype)

    def encode(self, sources: Sequence[Source]) -> tuple[np.ndarray, list[str | None]]:
        """Unit vectors x_NI in float32 and, per image, the reason why it has none (its row is zero then)."""
        x_NI = np.zeros((len(sources), self.dim), np.float32)
        found: list[Outcome] = []
        parts: list[Tensor] = []  # on the device: a copy after each batch would wait for it
        decoded = self._batches(sources)
        first = list(islice(decoded, 1))  # is there before the GPU's turn is taken
        with self._turn:
            for slots, outcomes in chain(first, decoded):
                good = [n for n, outcome in enumerate(outcomes) if not isinstance(outcome, str)]
                found += outcomes
                if good:
                    parts.append(self._in_pieces(self._batch_of(slots, outcomes, good))[: len(good)])
        faults = [outcome if isinstance(outcome, str) else None for outcome in found]
        if parts:
            x_NI[[fault is None for fault in faults]] = torch.cat(parts).cpu().numpy()
        return x_NI, faults

    def _batches(self, sources: Sequence[Source]) -> Iterator[Decoded]:
        """Slots and outcomes of each batch while the next ones are decoded; slots are used again then."""
        decoder = self._decoder = self._decoder or self._open()
        slots = decoder.into.slots()
        waiting: deque[Started] = deque()
        for number, start in enumerate(range(0, len(sources), self.batch)):
            if len(waiting) == AHEAD:
                yield self._wait(decoder, slots, waiting)
                if self._copies is not None:
                    self._copies.synchronize()
            chunk, first = sources[start : start + self.batch], number % AHEAD * self.batch
            waiting.append((first, decoder.start(first, chunk)))
        while waiting:
            yield self._wait(decoder, slots, waiting)

    def _wait(self, decoder: Decoder, slots: np.ndarray, waiting: deque[Started]) -> Decoded:
        first, started = waiting.popleft()
        outcomes = decoder.wait(started)
        return slots[first : first + len(outcomes)], outcomes

    def _open(self) -> Decoder:
        """The decoder and its buffer; a cut picture's shape is found by cutting one."""
        of = self._pixels_of
        one = of.cut if isinstance(of, Preprocessing) else lambda picture: of([picture])[0]
        sample = one(Image.new("RGB", (64, 64)))
        stride, longest = sample.nbytes, 0
        # A processor that is no cut and table cannot be handed to another process.
        processes = self.device.type == "cuda" and isinstance(of, Preprocessing)
        if self._cuts:
            stride, longest = UNCUT * stride, UNCUT * max(sample.shape)
        size = AHEAD * self.batch * stride
        buffer = shared_bytes(size) if processes else bytearray(size)
        into = Into(buffer, stride, sample.shape, sample.dtype.str, one, self._limits, longest)
        self._shape, self._pixel = sample.shape, sample.dtype
        if self.device.type == "cuda":
            pin(self, into.slots())
        return Decoder(into, self._threads, processes)

    def _batch_of(self, slots: np.ndarray, outcomes: Sequence[Outcome], good: list[int]) -> Tensor:
        """The pixels of a batch on the device, filled up where all must have one shape."""
        if self._cuts:
            from prerank_tools.encoders.scaling_triton import cut_pictures

            pictures = [(n, uncut_size(outcomes[n])) for n in good]
            pixels = cut_pictures(slots, pictures, self._pixels_of.cut, self._send)  # type: ignore[attr-defined]
        else:
            whole = slots if len(good) == len(slots) else slots[good]
            pixels = self._send(whole.view(self._pixel).reshape(-1, *self._shape))
        if self._one_shape and len(pixels) < self.batch:
            blank = pixels.new_zeros((self.batch - len(pixels), *self._shape))
            pixels = torch.cat([pixels, blank])
        return pixels

    def _send(self, array: np.ndarray) -> Tensor:
        """To the device, beside whatever it computes."""
        if self._copies is None:
            return torch.from_numpy(array)
        computing = torch.cuda.current_stream()
        with torch.cuda.stream(self._copies):
            sent = torch.from_numpy(array).to(self.device, non_blocking=True)
        computing.wait_stream(self._copies)
        sent.record_stream(computing)
        return sent

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Unit vectors (B, I) of one batch, on the device; from floats (B, C, H, W) or bytes (B, H, W, C)."""
        pixels = pixels.to(self.device)
        if pixels.dtype == torch.uint8:
            pixels = self._floats(pixels)
        pixels = pixels.to(self.dtype, memory_format=torch.channels_last)
        return normalize(self.tower(pixels), dim=-1)

    def _floats(self, pixels_BHWC: Tensor) -> Tensor:
        """The float of each byte, (B, C, H, W)."""
        assert self._values_CV is not None
        first_C = torch.arange(len(self._values_CV), device=self.device, dtype=torch.int32) * 256
        return self._values_CV.flatten()[pixels_BHWC.int() + first_C].permute(0, 3, 1, 2)


def uncut_size(outcome: Outcome) -> tuple[int, int] | None:
    """Width and height of a picture that is still to be cut."""
    return outcome if isinstance(outcome, tuple) else None


def can_cut_on_gpu(pixels_of: object) -> bool:
    """Is this a cut whose bytes are known, and is there Triton?"""
    if not isinstance(pixels_of, Preprocessing) or find_spec("triton") is None:
        return False
    return order_of(pixels_of.cut.resample) is not None


def pin(owner: object, array: np.ndarray) -> None:
    """Lock an array's pages for the time its owner lives: the GPU then copies them without the processor."""
    cuda = torch.cuda.cudart()
    if int(cuda.cudaHostRegister(array.ctypes.data, array.nbytes, 0)) == 0:
        weakref.finalize(owner, cuda.cudaHostUnregister, array.ctypes.data)
