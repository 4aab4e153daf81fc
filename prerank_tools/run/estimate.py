"""Rows, bytes and memory that a table stage will take, from trying a few of its shards in a scratch folder.

Memory is the peak of anonymous memory of one worker, libraries included, mapped files not. What a shard takes
here it will take there; where a trial is a piece of a shard, the stage adds what the rest takes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from prerank_tools.run.worker import write_part
from prerank_tools.stage import Context, Part, Shard, Stage
from prerank_tools.tables.parquet import read_faults

LOOKS_EVERY = 0.005  # seconds
KEYS = ("rows_out", "bytes_out", "memory_bytes")


def estimate(stage: Stage, ctx: Context, shards: Sequence[Shard], memory: PeakMemory) -> Mapping[str, Any]:
    """`rows_out`, `bytes_out` of all tables, `memory_bytes`: what the stage knows, else what it tried."""
    said = dict(stage.estimate(ctx, shards))
    return said if said.keys() >= set(KEYS) else _tried(stage, ctx, shards, memory) | said


def _tried(stage: Stage, ctx: Context, shards: Sequence[Shard], memory: PeakMemory) -> dict[str, Any]:
    rows, size, more = 0.0, 0.0, 0
    with TemporaryDirectory(prefix="prerank-") as folder:
        ctx = replace(ctx, work=Path(folder), gates=[], gate="warn", log=_silent)
        trials = stage.trials(ctx, shards)
        stage.prepare_trials(ctx, trials)
        for number, trial in enumerate(trials):
            with read_faults(trial.shard.path or stage.name):
                part = stage.process(trial.shard, ctx)
            files = write_part(part, stage, ctx.work, "data", number)
            tables = [file for file in files if not file["path"].startswith("quarantine/")]
            rows += trial.times * _rows_of(part)
            size += trial.times * sum(file["bytes"] for file in tables)
            more = max(more, trial.more_bytes)
    return {"rows_out": round(rows), "bytes_out": round(size), "memory_bytes": memory.peak + more}


def _rows_of(part: Part) -> int:
    """Rows of the main table; of all side tables where there is no main one."""
    return sum(map(len, part.tables.values())) if part.frame is None else len(part.frame)


def _silent(event: str, **fields: Any) -> None:
    """A trial says nothing."""


class PeakMemory:
    """Watches the anonymous memory of this process while it is open."""

    def __init__(self) -> None:
        self.seen = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def peak(self) -> int:
        """Bytes, so far."""
        self.seen = max(self.seen, anonymous_bytes())
        return self.seen

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(LOOKS_EVERY):
            self.seen = max(self.seen, anonymous_bytes())


def anonymous_bytes() -> int:
    """RssAnon of this process as the kernel tells it; 0 where it does not."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)
