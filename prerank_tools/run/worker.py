"""What an engine runs for one shard: read, compute, write, commit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from prerank_tools.errors import PrerankError, RetryError
from prerank_tools.run.commit import commit_file, commit_json, link_file
from prerank_tools.run.events import Events
from prerank_tools.run.threads import fix_threads, take_gpu
from prerank_tools.stage import Context, Part, Shard, Stage
from prerank_tools.tables.parquet import read_faults, write_parquet
from prerank_tools.tables.table import stamp

# The contexts of this process, by run: a model loaded for one shard serves the next.
_contexts: dict[str, Context] = {}


@dataclass(frozen=True)
class Task:
    """Everything a process needs for any shard of a job; engines carry it and a shard, nothing else."""

    stage: Stage
    context: Context
    mapped: str  # folder of the mapped parts, relative to the work folder
    run: str  # names this run: a process keeps one context a run

    def __call__(self, shard: Shard) -> dict[str, Any]:
        """Process and commit one shard; returns its commit record, and what it had to say as `events`."""
        ctx = _contexts.setdefault(self.run, self.context)
        fix_threads(ctx.threads)
        if ctx.device == "cuda":
            take_gpu()
        try:
            record = self._made(shard, ctx)
        except PrerankError as fault:
            fault.events = _events(ctx, shard)
            raise
        commit_json(ctx.work / "shards" / f"{shard.index:05d}.json", record)
        return {**record, "events": _events(ctx, shard)}

    def _made(self, shard: Shard, ctx: Context) -> dict[str, Any]:
        started = time.perf_counter()
        with read_faults(shard.path or self.stage.name):
            part = self.stage.process(shard, ctx)
        check_unchanged(ctx)
        _say_quarantined(part, shard, ctx)
        files = write_part(part, self.stage, ctx.work, self.mapped, shard.index)
        return {
            "index": shard.index,
            "rows": 0 if part.frame is None else len(part.frame),
            "files": files,
            "counts": {**part.counts, "quarantined": 0 if part.quarantine is None else len(part.quarantine)},
            "seconds": round(time.perf_counter() - started, 4),
        }


def _events(ctx: Context, shard: Shard) -> list[dict[str, Any]]:
    return ctx.log.take(shard.index) if isinstance(ctx.log, Events) else []


def _say_quarantined(part: Part, shard: Shard, ctx: Context) -> None:
    if part.quarantine is not None and len(part.quarantine):
        reason = part.quarantine["reason"].mode().min()  # the most frequent
        ctx.log("quarantine", shard=shard.index, rows=len(part.quarantine), reason=reason)


def write_part(part: Part, stage: Stage, work: Path, folder: str, index: int) -> list[dict[str, Any]]:
    """Write one part's tables whole; returns path, rows, bytes and sha256 of each file."""
    frames: dict[str, tuple[pl.DataFrame, str]] = {}
    if part.frame is not None:
        frames[folder] = (part.frame, stage.output)
    for name, frame in part.tables.items():
        frames[f"{name}/data"] = (frame, stage.tables.get(name, ""))
    if part.quarantine is not None and len(part.quarantine):
        frames["quarantine"] = (part.quarantine, "")
    files = []
    for published in part.linked:
        path = Path(folder) / Path(published["path"]).name
        link_file(work / path, Path(published["path"]))
        files.append({**published, "path": str(path)})
    for place, (frame, contract) in frames.items():
        path = Path(place) / f"part-{index:05d}.parquet"
        written = commit_file(work / path, lambda to, f=frame, c=contract: _write(f, to, c, stage))  # type: ignore[misc]
        files.append({"path": str(path), "rows": len(frame), **written})
    return files


def check_unchanged(ctx: Context) -> None:
    """Refuse to commit rows of an input that was replaced since the job opened it."""
    for role, table in ctx.inputs.items():
        for seen in table.stamps:
            try:
                now = stamp(Path(seen[0]))
            except FileNotFoundError:
                now = ("", 0, 0)
            if now != seen:
                raise RetryError(
                    f"{seen[0]}: {role} was replaced while this job read it", "run the same line again"
                )


def _write(frame: pl.DataFrame, path: Path, contract: str, stage: Stage) -> None:
    write_parquet(frame, path, contract=contract, compression=stage.compression, metadata=stage.footer())


def summed(records: Sequence[Mapping[str, Any]]) -> dict[str, int | float]:
    """Counts added up over shards."""
    total: dict[str, int | float] = {}
    for record in records:
        for name, number in record["counts"].items():
            total[name] = total.get(name, 0) + number
    return total
