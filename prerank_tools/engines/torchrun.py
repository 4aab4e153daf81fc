"""The torchrun engine: the same command line in every rank, one queue of shards for all of them.

Ranks share a filesystem and a TCP store; nothing but shard numbers travels. Under Slurm or across hosts,
start the command with torchrun yourself and every rank joins; on one host `--engine torchrun` starts it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from prerank_tools.errors import PrerankError, RetryError
from prerank_tools.stage import Shard

PATIENCE = timedelta(hours=12)  # a codebook may be fitted by rank 0 while the others wait
ERROR_FILE = "PRERANK_ERROR_FILE"
PR_SET_PDEATHSIG = 1
LOOKS_EVERY = 0.05  # seconds


def in_group() -> bool:
    """Whether this process is a rank that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """This process's number, 0 outside of torchrun."""
    return int(os.environ.get("RANK", "0")) if in_group() else 0


def launch(argv: Sequence[str], *, workers: int, error_file: Path) -> None:
    """Run this command line again under torchrun, `workers` ranks on this host.

    Raises what a rank raised; RetryError where one was killed.
    """
    error_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "prerank_tools.engines.agent", "--standalone"]
    environment = {**os.environ, ERROR_FILE: str(error_file), "LOGLEVEL": "CRITICAL"}
    agent = subprocess.Popen(
        [*command, f"--nproc-per-node={workers}", "-m", "prerank_cli", *argv],
        env=environment,
        stdout=subprocess.DEVNULL,
        preexec_fn=stop_with_parent,
    )
    try:
        ended = agent.wait()
        if error_file.is_file():
            told = json.loads(error_file.read_text())
            fault = PrerankError(told["message"], told["hint"])
            fault.exit_code = told["exit_code"]
            raise fault
        if ended:
            raise RetryError("a rank died; the finished shards stay", "run the same line again")
    finally:
        # Told to stop: the agent stops its ranks; killed, it would leave them running.
        agent.terminate()
        agent.wait()
        error_file.unlink(missing_ok=True)


def stop_with_parent() -> None:
    """In a new process: be told to stop when the one that started it dies, whatever kills that."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def announce(indices: Sequence[int] | None) -> None:
    """Rank 0 names the shards that are left; None where there is nothing to do at all."""
    if in_group():
        _store().set("left", json.dumps(indices))


def announced() -> list[int] | None:
    """What rank 0 announced; waits for it."""
    found: list[int] | None = json.loads(_awaited("left"))
    return found


def map_shards(
    task: Callable[[Shard], dict[str, Any]], shards: Sequence[Shard]
) -> Generator[dict[str, Any], None, None]:
    """Take shards from the group's queue, largest first, until it is empty; then wait for the other ranks.

    Yields the records of all ranks in rank 0, and this rank's own in the others.
    """
    store = _store()
    queue = sorted(shards, key=lambda shard: (-shard.rows, shard.index))
    own = set()
    while (turn := store.add("next", 1) - 1) < len(queue):
        record = task(queue[turn])
        own.add(turn)
        store.set(f"record/{turn}", json.dumps(record))
        yield record
    if rank() == 0:
        for turn in range(len(queue)):
            if turn not in own:
                yield json.loads(_awaited(f"record/{turn}"))
    store.add("finished", 1)


def _awaited(key: str) -> bytes:
    """The value of a key once a rank has set it; looked for, since the store's own wait hears no signal."""
    store, deadline = _store(), time.monotonic() + PATIENCE.total_seconds()
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise RetryError(f"no rank came with {key}", "run the same line again")
        time.sleep(LOOKS_EVERY)
    found: bytes = store.get(key)
    return found


def _store() -> Any:
    """The group's key-value store, opened once a process."""
    global _opened
    if _opened is None:
        from torch.distributed import TCPStore

        # torchrun's own rendezvous store: every rank is a client of it.
        _opened = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            int(os.environ["WORLD_SIZE"]),
            is_master=rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=PATIENCE,
        )
    return _opened


_opened: Any = None
