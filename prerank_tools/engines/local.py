"""The local engine: this process, or a pool of spawned ones."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from prerank_tools.errors import RetryError
from prerank_tools.stage import Shard

PR_SET_PDEATHSIG = 1
WAKE_SECONDS = 1.0


def map_shards(
    task: Callable[[Shard], dict[str, Any]], shards: Sequence[Shard], *, workers: int, threads: int
) -> Generator[dict[str, Any], None, None]:
    """Run shards one after another, or in `workers` processes, largest first.

    Raises RetryError where a worker process died (killed, out of memory); finished shards stay.
    """
    if workers <= 1 or len(shards) <= 1:
        yield from map(task, shards)
        return
    os.environ["OMP_NUM_THREADS"] = str(threads)  # inherited: read when a worker loads its libraries
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(workers, len(shards)), spawn, initializer=_begin_worker, initargs=(spawn.Value("i", 0),)
    )
    try:
        waiting = {pool.submit(task, shard) for shard in sorted(shards, key=lambda s: (-s.rows, s.index))}
        while waiting:
            # With a limit: the handler of Ctrl-C that polars installs does not wake a thread out of a lock.
            done, waiting = wait(waiting, timeout=WAKE_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as fault:
        raise RetryError(
            "a worker process died; the finished shards stay",
            "out of memory? run the same line again with fewer --workers",
        ) from fault
    except Exception:
        raise
    except BaseException:
        # Told to stop: what runs now is done again next time, and waiting for it could take hours.
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(started: Any) -> None:
    """Die with the parent, whatever kills it, leave Ctrl-C to it, and take the next worker number."""
    with started.get_lock():
        os.environ["LOCAL_RANK"] = str(started.value)
        started.value += 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
