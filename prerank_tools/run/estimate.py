"""Rows, bytes and memory that a table stage will take, from trying a few of its shards in a scratch folder.

Memory is the peak of anonymous memory of one worker, libraries included, mapped files not. What a shard takes
here it will take there; where a trial is a piece of a shard, the stage adds what the rest takes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from prerank_tools.errors import PrerankError
from prerank_tools.run.mapping import reduces
from prerank_tools.run.worker import write_part
from prerank_tools.stage import Context, Part, Shard, Stage
from prerank_tools.tables.parquet import read_faults

LOOKS_EVERY = 0.005  # seconds
KEYS = ("rows_out", "bytes_out", "memory_bytes")


def estimate(stage: Stage, ctx: Context, shards: Sequence[Shard], memory: PeakMemory) -> Mapping[str, Any]:
    """`rows_out`, `bytes_out` of all tables, `memory_bytes`: what the stage knows, else what it tried."""
    said = dict(stage.estimate(ctx, shards))
    if said.keys() >= set(KEYS):
        return said
    tried = _tried(stage, ctx, shards, memory)
    if "rows_out" in said and tried["rows_out"]:
        tried["bytes_out"] = round(tried["bytes_out"] * said["rows_out"] / tried["rows_out"])
    return tried | said


def _tried(stage: Stage, ctx: Context, shards: Sequence[Shard], memory: PeakMemory) -> dict[str, Any]:
    found = Found()
    with TemporaryDirectory(prefix="prerank-") as folder:
        ctx = replace(ctx, work=Path(folder), gates=[], gate="warn", log=_silent)
        trials = stage.trials(ctx, shards)
        stage.prepare_trials(ctx, trials)
        for number, trial in enumerate(trials):
            memory.mark()
            with read_faults(trial.shard.path or stage.name):
                part = stage.process(trial.shard, ctx)
            files = write_part(part, stage, ctx.work, "mapped", number)
            if reduces(stage):
                mapped = [ctx.work / file["path"] for file in files if file["path"].startswith("mapped/")]
                for reduced in stage.reduce(mapped, ctx) or ():
                    found.add(reduced, write_part(reduced, stage, ctx.work, "data", number), trial.times)
            else:
                found.add(part, files, trial.times)
            found.memory = max(found.memory, memory.since_mark + trial.more_bytes)
            with suppress(PrerankError):  # on so few rows a gate may not hold
                stage.quality(part.counts | {"quarantined": 0}, ctx)
        if reduces(stage):
            held = stage.reduce_row_bytes * sum(shard.rows for shard in shards)
            found.memory = max(found.memory, anonymous_bytes() + held)
    most = max(memory.peak, found.memory)
    return {"rows_out": round(found.rows), "bytes_out": round(found.bytes), "memory_bytes": most}


@dataclass
class Found:
    """Rows and bytes of the tables that trials made, each as often as the work holds its like; bytes held."""

    rows: float = 0.0
    bytes: float = 0.0
    memory: int = 0

    def add(self, part: Part, files: Sequence[Mapping[str, Any]], times: float) -> None:
        """Count one part; what it set aside is no table."""
        self.rows += times * _rows_of(part)
        self.bytes += times * sum(f["bytes"] for f in files if not f["path"].startswith("quarantine/"))


def _rows_of(part: Part) -> int:
    """Rows of the main table; of all side tables where there is no main one."""
    return sum(map(len, part.tables.values())) if part.frame is None else len(part.frame)


def _silent(event: str, **fields: Any) -> None:
    """A trial says nothing."""


class PeakMemory:
    """Watches the anonymous memory of this process while it is open."""

    def __init__(self) -> None:
        self.seen = 0
        self.marked = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def peak(self) -> int:
        """Bytes, so far."""
        self._look()
        return self.seen

    @property
    def since_mark(self) -> int:
        """Bytes, since the last `mark`."""
        self._look()
        return self.marked

    def mark(self) -> None:
        """Begin `since_mark` anew."""
        self.marked = 0

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
            self._look()

    def _look(self) -> None:
        now = anonymous_bytes()
        self.seen, self.marked = max(self.seen, now), max(self.marked, now)


def anonymous_bytes() -> int:
    """RssAnon of this process as the kernel tells it; 0 where it does not."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)
