"""Engines decide where and when a shard is processed; they are handed shard references only."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

from prerank_tools.errors import UsageError
from prerank_tools.stage import Shard

ENGINES = ("local", "torchrun", "ray")
Task = Callable[[Shard], dict[str, Any]]


def worker_number() -> int:
    """This process's number among the workers of its job, whatever the engine; 0 where it is the only one."""
    grouped = "TORCHELASTIC_RUN_ID" in os.environ
    return int(os.environ.get("RANK" if grouped else "LOCAL_RANK", "0"))


def map_shards(
    task: Task, shards: Sequence[Shard], *, engine: str, workers: int, threads: int, gpus: bool = False
) -> Generator[dict[str, Any], None, None]:
    """Commit records as shards finish, in any order. `task` reads, computes, writes and commits one shard."""
    if engine == "local":
        from prerank_tools.engines import local

        return local.map_shards(task, shards, workers=workers, threads=threads)
    if engine == "torchrun":
        from prerank_tools.engines import torchrun

        return torchrun.map_shards(task, shards)
    if engine == "ray":
        from prerank_tools.engines import ray

        return ray.map_shards(task, shards, workers=workers, threads=threads, gpus=gpus)
    raise UsageError(f"--engine {engine}: not an engine", f"one of {', '.join(ENGINES)}")
