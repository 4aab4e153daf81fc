"""Turns on a GPU: workers that share one compute one after another.

Processes that use a card at once get slices of its time, so all of them end together, and together they then
read and write while it idles. By turns they stay out of step: one computes while the others prepare.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import torch

PATIENCE = 60.0  # seconds; a turn takes one at most


class Turn:
    """`with turn:` waits until no other process holds the lock `path`; without a path it never waits.

    `finish` is called before the turn is handed on. A process that dies gives its turn back; one that hangs
    with it is waited for `PATIENCE` seconds, and then turns are over. The first time nobody waits: what a
    model compiles then would keep the others from the card. Raises OSError where the lock cannot be had.
    """

    def __init__(self, path: Path | None, finish: Callable[[], object] = lambda: None) -> None:
        self._finish = finish
        self._is_first = True
        self._lock: int | None = None
        if path is not None:
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            if os.fstat(self._lock).st_uid != os.getuid():
                self._drop()
                raise PermissionError(f"{path}: another user's")

    def __enter__(self) -> None:
        if self._lock is not None and not self._is_first:
            waiting = Thread(target=fcntl.flock, args=(self._lock, fcntl.LOCK_EX), daemon=True)
            waiting.start()
            waiting.join(PATIENCE)
            if waiting.is_alive():
                self._drop()  # what the thread still gets is given back at once
        self._is_first = False

    def __exit__(self, *fault: object) -> None:
        try:
            self._finish()
        finally:
            if self._lock is not None:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def __del__(self) -> None:
        self._drop()

    def _drop(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def turn_on(device: torch.device) -> Turn:
    """The turn of a GPU among this user's processes on this machine; on a CPU nobody waits."""
    if device.type != "cuda":
        return Turn(None)
    card = torch.cuda.get_device_properties(device).uuid
    path = Path(tempfile.gettempdir()) / f"prerank-{os.getuid()}-{card}.lock"
    try:
        return Turn(path, lambda: torch.cuda.current_stream(device).synchronize())
    except OSError:  # no lock to be had: slices then, which are slower and no fault
        return Turn(None)
