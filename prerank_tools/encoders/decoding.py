"""Decoding beside the forward pass: pictures into numbered slots of a buffer, by threads or by processes.

Pillow gives up the interpreter's lock while it decodes and scales, but not around it, and the forward pass
wants that lock too. Processes share the buffer; nothing else of a decoded picture travels between them.
"""

# B images of a batch, H height, W width, C channels

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
from PIL import Image

from prerank_tools.encoders.pictures import ImageError, Limits, Source, decode, load
from prerank_tools.errors import RetryError

Outcome = str | tuple[int, int] | None  # why there is no picture; width and height of an uncut one; or cut
TASK = 8  # pictures a process takes at once: few enough that none waits long for the last one


@dataclass(frozen=True)
class Into:
    """Where pictures go and how: a buffer of slots of `stride` bytes, each for the array `pixels_of` makes.

    A picture whose sides are at most `longest` and whose bytes fit into a slot is left uncut: a GPU does that
    faster. `shape` and `dtype` are those of a cut one.
    """

    buffer: Any  # whatever has numpy's buffer protocol: an array, or memory shared by processes
    stride: int
    shape: tuple[int, ...]
    dtype: str
    pixels_of: Callable[[Image.Image], np.ndarray]
    limits: Limits
    longest: int = 0

    def slots(self) -> np.ndarray:
        """The buffer as bytes (slots, stride)."""
        return np.frombuffer(self.buffer, np.uint8).reshape(-1, self.stride)

    def fill(self, first: int, sources: Sequence[Source]) -> list[Outcome]:
        """Decode into the slots from `first` on."""
        slots = self.slots()
        return [self.fill_one(slots[n], source) for n, source in enumerate(sources, first)]

    def fill_one(self, slot_S: np.ndarray, source: Source) -> Outcome:
        """Decode one picture into its slot, or say why not."""
        limits = self.limits
        try:
            picture = decode(load(source), max_pixels=limits.max_pixels, max_bytes=limits.max_bytes)
        except ImageError as fault:
            return str(fault)
        width, height = picture.size
        uncut = max(width, height) <= self.longest and width * height * 3 <= len(slot_S)
        pixels = np.asarray(picture) if uncut else self.pixels_of(picture)
        if not uncut and (pixels.shape != self.shape or pixels.dtype.str != self.dtype):
            raise ValueError(f"preprocessing gave {pixels.shape} after {self.shape}: one shape is needed")
        slot_S[: pixels.nbytes].view(pixels.dtype).reshape(pixels.shape)[...] = pixels
        return (width, height) if uncut else None


@dataclass(eq=False)
class Decoder:
    """`workers` threads, or processes where `processes`, that fill the slots of `into`."""

    into: Into
    workers: int
    processes: bool = False
    _pool: Executor | None = field(default=None, repr=False)

    def start(self, first: int, sources: Sequence[Source]) -> list[Future[list[Outcome]]]:
        """Begin to fill the slots from `first` on."""
        cuts = range(0, len(sources), TASK)
        return [self._submit(first + cut, sources[cut : cut + TASK]) for cut in cuts]

    def wait(self, started: Sequence[Future[list[Outcome]]]) -> list[Outcome]:
        """Until those slots are filled; what became of each picture, in their order.

        Raises RetryError where a process died.
        """
        try:
            return [outcome for future in started for outcome in future.result()]
        except BrokenProcessPool as fault:
            self._pool = None
            raise RetryError(
                "a process that decodes images died",
                "out of memory? run the same line again with fewer --threads",
            ) from fault

    def _submit(self, first: int, sources: Sequence[Source]) -> Future[list[Outcome]]:
        if self._pool is None:
            self._pool = self._open()
        if self.processes:
            return self._pool.submit(_fill, first, sources)
        return self._pool.submit(self.into.fill, first, sources)

    def _open(self) -> Executor:
        if not self.processes:
            return ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.workers, spawn, initializer=_begin, initargs=(self.into,))
        # A process of an engine waits for its children before the executor's own hook would end them; and its
        # queues, through which they are told to end, close at priority 10.
        Finalize(self, pool.shutdown, kwargs={"cancel_futures": True}, exitpriority=20)
        return pool


def shared_bytes(size: int) -> Any:
    """Memory that spawned processes see as well; it has no name, so nothing of it outlives them."""
    return multiprocessing.get_context("spawn").RawArray(ctypes.c_uint8, size)


_into: Into | None = None  # of this process, where it decodes for another one


def _begin(into: Into) -> None:
    """Leave Ctrl-C to the parent, and end with it, whatever ends it."""
    global _into
    _into = into
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _fill(first: int, sources: Sequence[Source]) -> list[Outcome]:
    assert _into is not None
    return _into.fill(first, sources)
