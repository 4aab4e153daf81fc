"""The torchrun engine: the same command line in every rank, one queue of shards for all of them.

Ranks share a filesystem and a TCP store; nothing but shard numbers travels. Under Slurm or across hosts,
start the command with torchrun yourself and every rank joins; on one host `--engine torchrun` starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from prerank_tools.errors import PrerankError, RetryError
from prerank_tools.stage import Shard

PATIENCE = timedelta(hours=12)  # a codebook may be fitted by rank 0 while the others wait
ERROR_FILE = "PRERANK_ERROR_FILE"


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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    environment = {**os.environ, ERROR_FILE: str(error_file), "LOGLEVEL": "CRITICAL"}
    ended = subprocess.run(
        [*command, "-m", "prerank_cli", *argv], env=environment, stdout=subprocess.DEVNULL, check=False
    )
    if error_file.is_file():
        told = json.loads(error_file.read_text())
        error_file.unlink()
        fault = PrerankError(told["message"], told["hint"])
        fault.exit_code = told["exit_code"]
        raise fault
    if ended.returncode:
        raise RetryError("a rank died; the finished shards stay", "run the same line again")


def announce(indices: Sequence[int] | None) -> None:
    """Rank 0 names the shards that are left; None where there is nothing to do at all."""
    _store().set("left", json.dumps(indices))


def announced() -> list[int] | None:
    """What rank 0 announced; waits for it."""
    store = _store()
    store.wait(["left"], PATIENCE)
    found: list[int] | None = json.loads(store.get("left"))
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
                store.wait([f"record/{turn}"], PATIENCE)
                yield json.loads(store.get(f"record/{turn}"))
    store.add("finished", 1)


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
