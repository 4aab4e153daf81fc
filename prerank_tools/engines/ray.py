"""The Ray engine: actors over a cluster that take shards and commit them; Ray moves no table."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prerank_tools.errors import PrerankError, RetryError, UsageError
from prerank_tools.stage import Shard

WAKE_SECONDS = 1.0
RETRIES = 3  # times a shard is tried elsewhere after its actor was lost


def map_shards(
    task: Callable[[Shard], dict[str, Any]],
    shards: Sequence[Shard],
    *,
    workers: int,
    threads: int,
    gpus: bool = False,
) -> Generator[dict[str, Any], None, None]:
    """Run shards on `workers` actors (a GPU each with `gpus`), largest first; a lost actor's shard moves on.

    Joins the cluster that `RAY_ADDRESS` names (`auto` for the one on this host), else starts a private one.
    Raises RetryError where a shard lost its actor four times.
    """
    ray = _connect()
    cpus = min(threads, int(ray.cluster_resources().get("CPU", threads)))
    remote = ray.remote(num_cpus=cpus, num_gpus=1 if gpus else 0, max_restarts=0)(_Worker)
    handed, folder, number = ray.put(task), str(Path.cwd()), itertools.count()
    waiting = sorted(shards, key=lambda shard: (-shard.rows, shard.index))
    tries = {shard.index: 0 for shard in shards}
    busy: dict[Any, tuple[Any, Shard]] = {}
    idle = [remote.remote(handed, folder, next(number)) for _ in range(min(workers, len(waiting)))]
    with _held_signals() as heard:
        while waiting or busy:
            while waiting and idle:
                actor, shard = idle.pop(), waiting.pop(0)
                busy[actor.run.remote(shard)] = (actor, shard)
            finished, _ = ray.wait(list(busy), num_returns=1, timeout=WAKE_SECONDS)
            heard()
            if not finished:
                continue
            actor, shard = busy.pop(finished[0])
            try:
                record = ray.get(finished[0])
            except ray.exceptions.RayActorError as fault:
                tries[shard.index] += 1
                if tries[shard.index] > RETRIES:
                    raise RetryError(
                        f"shard {shard.index} lost its actor {RETRIES + 1} times",
                        "out of memory? run the line again",
                    ) from fault
                waiting.insert(0, shard)
                idle.append(remote.remote(handed, folder, next(number)))
                continue
            except ray.exceptions.RayTaskError as fault:
                if isinstance(fault.cause, PrerankError):
                    raise fault.cause from None
                raise
            idle.append(actor)
            yield record


@contextmanager
def _held_signals() -> Iterator[Callable[[], None]]:
    """Keep SIGTERM and Ctrl-C until the function it gives is called: Ray's wait loses an exception in it."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    kept: list[tuple[int, Any]] = []
    handlers: dict[int, Any] = {
        number: signal.signal(number, lambda number, frame: kept.append((number, frame)))
        for number in (signal.SIGTERM, signal.SIGINT)
    }

    def heard() -> None:
        if kept:
            handlers[kept[0][0]](*kept[0])

    try:
        yield heard
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Worker:
    """One actor: it keeps its model between shards and works in the folder where the line was typed."""

    def __init__(self, task: Callable[[Shard], dict[str, Any]], folder: str, number: int) -> None:
        os.chdir(folder)
        os.environ["LOCAL_RANK"] = str(number)
        self.task = task

    def run(self, shard: Shard) -> dict[str, Any]:
        return self.task(shard)


def _connect() -> Any:
    try:
        import ray
    except ImportError as fault:
        raise UsageError("--engine ray: ray is not installed", "pip install 'prerank[ray]'") from fault
    if not ray.is_initialized():
        stop = signal.getsignal(signal.SIGTERM)
        # `local` where no cluster is named: Ray alone would join whichever one was started last on this host.
        ray.init(
            os.environ.get("RAY_ADDRESS", "local"),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)  # Ray puts its own, which exits with 15
    return ray
