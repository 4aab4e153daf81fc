"""Memory that threads have used: heaps of the C library, shared by few instead of kept by each."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

HEAPS = 2
M_ARENA_MAX = -8  # glibc's number of it, malloc.h


def share_heaps() -> None:
    """Let threads share two heaps: each of its own keeps what its largest shard took, 130 MB of `gsu topk`.

    To be called before libraries start threads; processes started later do likewise. `MALLOC_ARENA_MAX` of
    the environment has the last word.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    os.environ["MALLOC_ARENA_MAX"] = str(HEAPS)
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, HEAPS)
