"""One job an output: a lock that dies with its process."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from prerank_tools.errors import PrerankError, RetryError


class Lock:
    """An exclusive lock on `.<name>.lock` beside the output; the kernel drops it when the process ends.

    Raises RetryError where another job holds it.
    """

    def __init__(self, out: Path) -> None:
        self.path = out.parent / f".{out.name}.lock"
        self.out = out
        self.descriptor = -1

    def __enter__(self) -> Lock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except (PermissionError, NotADirectoryError, FileExistsError) as fault:
            raise PrerankError(
                f"{self.out.parent}: cannot write there ({fault.strerror})", "check the path"
            ) from fault
        except OSError as fault:
            if fault.errno == 30:  # EROFS
                raise PrerankError(
                    f"{self.out.parent}: read-only filesystem", "write somewhere else"
                ) from fault
            raise
        return self

    def _acquire(self) -> None:
        while True:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self.path.read_text().strip() or "unknown"
                os.close(self.descriptor)
                raise RetryError(
                    f"{self.out}: another job is writing it (process {holder})",
                    "wait for it, then run the same line again",
                ) from None
            # The holder before us may have removed the file between our open and our lock.
            if self._is_current():
                break
            os.close(self.descriptor)
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, str(os.getpid()).encode())

    def _is_current(self) -> bool:
        try:
            return self.path.stat().st_ino == os.fstat(self.descriptor).st_ino
        except FileNotFoundError:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)
