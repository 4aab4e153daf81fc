"""Map the shards of a table stage and reduce them, going on from what an earlier run left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from prerank_tools.engines import map_shards, torchrun
from prerank_tools.errors import ContractError
from prerank_tools.run.commit import commit_json, flush_files, sha256
from prerank_tools.run.events import Events, tell, told_of_faults
from prerank_tools.run.options import RunOptions
from prerank_tools.run.publishing import published_files
from prerank_tools.run.worker import Task, write_part
from prerank_tools.stage import Context, Shard, Stage


def open_work(ctx: Context, work: str, shards: Sequence[Shard]) -> None:
    """Enter the work folder: keep what an earlier run of the same work finished, drop anything else."""
    plan = {"fingerprint": work, "shards": [_planned(shard) for shard in shards]}
    path = ctx.work / "plan.json"
    if path.is_file():
        if json.loads(path.read_text()) == plan:
            ctx.log("resume", path=str(ctx.work))
            return
        ctx.log("discard", path=str(ctx.work), reason="unfinished, from different work")
    if ctx.work.exists():
        shutil.rmtree(ctx.work)
    ctx.work.mkdir(parents=True)
    commit_json(path, plan)


def _planned(shard: Shard) -> str:
    # Paths stay out: a moved input with the same bytes is the same work.
    return f"{shard.index}:{shard.offset}+{shard.rows}:{json.dumps(dict(shard.extra), sort_keys=True)}"


def map_stage(
    stage: Stage, ctx: Context, options: RunOptions, shards: Sequence[Shard]
) -> list[dict[str, Any]]:
    """Commit records of all shards, in order: those found whole, and those that the engine now makes."""
    _prepare(stage, ctx)
    records = {shard.index: record for shard in shards if (record := committed(ctx.work, shard.index))}
    options.progress(len(records), len(shards), {})
    left = [shard for shard in shards if shard.index not in records]
    workers = options.workers_on(ctx.device)
    alone = options.engine == "local" and (workers == 1 or len(left) == 1)
    own = ctx if alone else replace(ctx, log=Events(), cache={})
    torchrun.announce([shard.index for shard in left])
    mapped = map_shards(
        _task(stage, own),
        left,
        engine=options.engine,
        workers=workers,
        threads=options.threads,
        gpus=ctx.device == "cuda",
    )
    # Closed whatever happens between two records, so that a stop reaches the workers.
    with closing(mapped), told_of_faults(ctx.log):
        for record in mapped:
            tell(record.pop("events", ()), ctx.log)
            records[record["index"]] = record
            options.progress(len(records), len(shards), record)
    return [records[shard.index] for shard in shards]


def follow_map(stage: Stage, ctx: Context, options: RunOptions, left: Sequence[Shard]) -> None:
    """A rank's share of the shards; rank 0 hears of what it did through their records."""
    task = _task(stage, replace(ctx, log=Events()))
    with told_of_faults(ctx.log):
        for _ in map_shards(task, left, engine=options.engine, workers=1, threads=options.threads):
            pass


def _task(stage: Stage, ctx: Context) -> Task:
    return Task(stage, ctx, "_tmp/mapped" if reduces(stage) else "data", uuid4().hex)


def reduces(stage: Stage) -> bool:
    """Whether the mapped parts are not the result yet."""
    return type(stage).reduce is not Stage.reduce


def _prepare(stage: Stage, ctx: Context) -> None:
    """Run `prepare` once; after a kill its files are taken as they are only if all of them are whole."""
    if type(stage).prepare is Stage.prepare:
        return
    record_path = ctx.work / "shards" / "prepare.json"
    if record_path.is_file():
        record = json.loads(record_path.read_text())
        if all(_is_whole(ctx.work, file) for file in record["files"]):
            ctx.gates.extend(record["gates"])
            return
    stage.prepare(ctx)
    # The record vouches for the scratch files of `prepare` too, and nobody looks at those again.
    flush_files(ctx.scratch)
    files = [
        {"path": str(path.relative_to(ctx.work)), "bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in published_files(ctx.work)
    ]
    commit_json(record_path, {"files": files, "gates": ctx.gates})


def committed(work: Path, index: int) -> dict[str, Any] | None:
    """The commit record of a shard, if every file it names is there, byte for byte."""
    path = work / "shards" / f"{index:05d}.json"
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record if all(_is_whole(work, file) for file in record["files"]) else None


def _is_whole(work: Path, file: Mapping[str, Any]) -> bool:
    path = work / file["path"]
    return path.is_file() and path.stat().st_size == file["bytes"] and sha256(path) == file["sha256"]


def reduce_stage(stage: Stage, ctx: Context, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of the final parts: those of `reduce`, or the mapped ones where there is none."""
    if not reduces(stage):
        return records
    mapped = [
        ctx.work / file["path"]
        for record in records
        for file in record["files"]
        if file["path"].startswith("_tmp/mapped")
    ]
    side = [[f for f in r["files"] if not f["path"].startswith("_tmp/mapped")] for r in records]
    shutil.rmtree(ctx.work / "data", ignore_errors=True)
    parts = stage.reduce(mapped, ctx)
    assert parts is not None, f"{stage.name}.reduce returned None"
    reduced = []
    for index, part in enumerate(parts):
        files = write_part(part, stage, ctx.work, "data", index)
        before: dict[str, Any] = records[index] if index < len(records) else {"counts": {}, "seconds": 0.0}
        counts = {**before["counts"], **part.counts}
        kept = side[index] if index < len(side) else []
        rows = 0 if part.frame is None else len(part.frame)
        reduced.append(
            {
                "index": index,
                "rows": rows,
                "files": [*kept, *files],
                "counts": counts,
                "seconds": before["seconds"],
            }
        )
    return reduced


def hold_bad(ctx: Context, counts: Mapping[str, float], max_bad: float) -> None:
    """Refuse a run that set aside more than the accepted share of its rows."""
    bad, rows = counts.get("quarantined", 0), counts.get("rows_in", 0)
    if bad and bad > max_bad * rows:
        raise ContractError(
            f"{int(bad)} of {int(rows)} rows are unusable, more than --max-bad {max_bad:g}",
            f"see {ctx.work}/quarantine; mend them, or allow them: --max-bad {bad / max(rows, 1):.2g}",
        )
