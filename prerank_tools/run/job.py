"""Run a stage: plan, map, reduce, publish. Runs again where a killed one stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from prerank_tools.engines import map_shards, torchrun
from prerank_tools.errors import ConflictError, ContractError, PrerankError, RetryError, UsageError
from prerank_tools.run.commit import commit_file, commit_json, publish, sha256
from prerank_tools.run.gates import compare
from prerank_tools.run.lock import Lock
from prerank_tools.run.manifest import Manifest, describe_inputs, environment, fingerprint, read_manifest
from prerank_tools.run.threads import fix_threads
from prerank_tools.run.worker import Task, check_unchanged, summed, write_part
from prerank_tools.stage import Context, Shard, Stage
from prerank_tools.tables.parquet import concat_parquet, read_faults
from prerank_tools.tables.table import Folder, Table, open_folder, open_table

# What belongs to the run and not to the result.
UNPUBLISHED = ("manifest.json", "shards", "_tmp", "plan.json", "quarantine")


def _no_progress(done: int, total: int, record: Mapping[str, Any]) -> None:
    """The default progress report."""


def _no_log(event: str, **fields: Any) -> None:
    """The default log."""


@dataclass(frozen=True)
class RunOptions:
    """How to run: none of these can change the result, except `device` and `threads` in its last bits."""

    workers: int | None = None
    threads: int = 2
    device: str = "cpu"
    engine: str = "local"
    overwrite: bool = False
    dry_run: bool = False
    gate: str = "fail"
    compare_to: Path | None = None
    max_bad: float = 0.001
    argv: tuple[str, ...] = ()
    progress: Callable[[int, int, Mapping[str, Any]], None] = field(default=_no_progress, compare=False)
    log: Callable[..., None] = field(default=_no_log, compare=False)


@dataclass(frozen=True)
class Result:
    """What happened: `status` is done, up to date or planned."""

    status: str
    out: Path
    manifest: Manifest | None
    plan: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The one JSON object of `--json`: the keys of the manifest that a script asks for."""
        found: dict[str, Any] = {"status": self.status, "output": str(self.out), **self.plan}
        if self.manifest:
            found |= {
                "stage": self.manifest.stage,
                "rows": self.manifest.outputs.get("rows", 0),
                "seconds": self.manifest.timing.get("seconds"),
                "counts": self.manifest.counts,
                "quality": self.manifest.quality,
                "gates": self.manifest.gates,
                "fingerprint": self.manifest.fingerprint,
                "content_digest": self.manifest.content_digest,
            }
        return found


def run(stage: Stage, out: Path, options: RunOptions) -> Result:
    """Make `out` from the stage's inputs, or find it up to date.

    Raises ConflictError where `out` comes from other work, RetryError where it is being written or an input
    changed on the way, ContractError and GateError where an input or the result must not go further.
    """
    with read_faults(f"{stage.name}: {' or '.join(str(path) for path, _ in stage.inputs().values())}"):
        return _run(stage, out.absolute(), options)


def _run(stage: Stage, out: Path, options: RunOptions) -> Result:
    single = out.suffix == ".parquet" and stage.kind == "table"
    if single and (stage.folder_only or stage.tables):
        raise UsageError(
            f"{out}: {stage.name} stores more than one table here, or a model beside it",
            "name a folder with -o",
        )
    inputs = open_inputs(stage)
    work = fingerprint(stage, inputs)
    partial = out.parent / f".{out.name}.partial"
    ctx = Context(
        work=partial,
        threads=options.threads,
        device=resolve_device(options.device),
        log=options.log,
        inputs=inputs,
        gate=options.gate,
    )
    fix_threads(options.threads)
    if options.dry_run:
        return _dry_run(stage, out, ctx, work)
    if options.engine == "torchrun" and not torchrun.in_group():
        torchrun.launch(
            options.argv[1:], workers=_workers(options, ctx.device), error_file=partial.with_suffix(".error")
        )
        return Result("done", out, read_manifest(out))
    if torchrun.rank() > 0:
        return _follow(stage, out, ctx, options)
    with Lock(out):
        published = read_manifest(out) if out.exists() else None
        if published and published.fingerprint == work:
            shutil.rmtree(partial, ignore_errors=True)
            _announce(None)
            return Result("up to date", out, published)
        if out.exists() and not options.overwrite:
            raise ConflictError(_conflict(out, published, stage), "add --overwrite, or name another output")
        stage.check(ctx)
        try:
            manifest = _work(stage, ctx, options, work, single)
            check_unchanged(ctx)
            _publish(stage, ctx, manifest, out, single)
        except OSError as fault:
            raise _disk_fault(fault, partial) from fault
        return Result("done", out, manifest)


def _follow(stage: Stage, out: Path, ctx: Context, options: RunOptions) -> Result:
    """What a rank other than 0 does: a share of the shards, or its part in a training; it never publishes."""
    left = torchrun.announced()
    if left is None:
        return Result("followed", out, None)
    if stage.kind == "table":
        shards = {shard.index: shard for shard in stage.plan(ctx)}
        mapped = "_tmp/mapped" if _reduces(stage) else "data"
        task = Task(stage, ctx, mapped, uuid4().hex)
        for _ in map_shards(
            task, [shards[index] for index in left], engine=options.engine, workers=1, threads=options.threads
        ):
            pass
    else:
        own = ctx.work / "_tmp" / f"rank{torchrun.rank()}"
        own.mkdir(parents=True, exist_ok=True)
        stage.build(replace(ctx, work=own, shared_scratch=ctx.work / "_tmp"))
    return Result("followed", out, None)


def _announce(indices: Sequence[int] | None) -> None:
    if torchrun.in_group():
        torchrun.announce(indices)


def open_inputs(stage: Stage) -> dict[str, Table | Folder]:
    """Open every input of a stage, in the order it names them."""
    inputs: dict[str, Table | Folder] = {}
    for role, (path, contract) in stage.inputs().items():
        with read_faults(str(path)):
            inputs[role] = open_table(path, contract, role=role) if contract else open_folder(path, role=role)
    return inputs


def resolve_device(device: str) -> str:
    """`auto` is the GPU where there is one; `cuda` without one is an error, never a silent CPU run."""
    if device == "cpu" or (device == "auto" and not Path("/dev/nvidiactl").exists()):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "auto":
        return "cpu"
    raise UsageError(
        f"--device {device}: torch sees no GPU here", "use --device cpu, or install a CUDA build of torch"
    )


def _work(stage: Stage, ctx: Context, options: RunOptions, work: str, single: bool) -> Manifest:
    """Everything between the lock and the rename; leaves a whole output in `ctx.work`."""
    started, clock = datetime.now(UTC), time.perf_counter()
    if stage.kind == "table":
        shards = list(stage.plan(ctx))
        _open_work(ctx, work, [_planned(shard) for shard in shards])
        records = _map(stage, ctx, options, shards)
        records = _reduce(stage, ctx, records)
        counts = summed(records)
        _hold_bad(ctx, counts, options.max_bad)
        quality = dict(stage.quality(counts, ctx))
    else:
        _open_work(ctx, work, [])
        _announce([])
        quality, counts, records = dict(stage.build(ctx)), {}, []
    manifest = Manifest(
        stage=stage.name,
        stage_version=stage.version,
        fingerprint=work,
        params=json.loads(json.dumps(dict(stage.params()), default=str)),
        inputs=describe_inputs(ctx.inputs),
        lineage=dict(stage.lineage(ctx)),
        data_cutoff=stage.data_cutoff(ctx),
        outputs=_outputs(stage, ctx, records, single),
        counts=counts,
        quality=json.loads(json.dumps(quality, default=float)),
        environment=environment(ctx),
    )
    manifest.content_digest = _content_digest(manifest.outputs)
    if options.compare_to is not None:
        compare(manifest, options.compare_to, ctx)
    manifest.gates = ctx.gates
    manifest.timing = {
        "started_at": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock, 3),
        "shard_seconds": [record["seconds"] for record in records],
    }
    manifest.invocation = {
        "id": uuid4().hex,
        "argv": list(options.argv),
        "engine": options.engine,
        "workers": _workers(options, ctx.device),
        "inputs": {role: str(table.path) for role, table in ctx.inputs.items()},
    }
    return manifest


def _open_work(ctx: Context, work: str, planned: Sequence[str]) -> None:
    """Enter the work folder: keep what an earlier run of the same work finished, drop anything else."""
    plan = {"fingerprint": work, "shards": list(planned)}
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


def _map(stage: Stage, ctx: Context, options: RunOptions, shards: Sequence[Shard]) -> list[dict[str, Any]]:
    _prepare(stage, ctx)
    mapped = "_tmp/mapped" if _reduces(stage) else "data"
    records = {shard.index: record for shard in shards if (record := _committed(ctx.work, shard.index))}
    options.progress(len(records), len(shards), {})
    left = [shard for shard in shards if shard.index not in records]
    context = (
        replace(ctx, log=_no_log, cache={}) if _workers(options, ctx.device) > 1 and len(left) > 1 else ctx
    )
    task = Task(stage, context, mapped, uuid4().hex)
    _announce([shard.index for shard in left])
    mapped_shards = map_shards(
        task,
        left,
        engine=options.engine,
        workers=_workers(options, ctx.device),
        threads=options.threads,
        gpus=ctx.device == "cuda",
    )
    # Closed whatever happens between two records, so that a stop reaches the workers.
    with closing(mapped_shards):
        for record in mapped_shards:
            records[record["index"]] = record
            options.progress(len(records), len(shards), record)
    return [records[shard.index] for shard in shards]


def _workers(options: RunOptions, device: str = "cpu") -> int:
    if options.workers:
        return options.workers
    if device == "cuda":
        import torch

        return torch.cuda.device_count()
    return max(1, (os.cpu_count() or 1) // options.threads)


def _reduces(stage: Stage) -> bool:
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
    files = [
        {"path": str(path.relative_to(ctx.work)), "bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in _published_files(ctx.work)
    ]
    commit_json(record_path, {"files": files, "gates": ctx.gates})


def _committed(work: Path, index: int) -> dict[str, Any] | None:
    """The commit record of a shard, if every file it names is there, byte for byte."""
    path = work / "shards" / f"{index:05d}.json"
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record if all(_is_whole(work, file) for file in record["files"]) else None


def _is_whole(work: Path, file: Mapping[str, Any]) -> bool:
    path = work / file["path"]
    return path.is_file() and path.stat().st_size == file["bytes"] and sha256(path) == file["sha256"]


def _reduce(stage: Stage, ctx: Context, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not _reduces(stage):
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


def _hold_bad(ctx: Context, counts: Mapping[str, float], max_bad: float) -> None:
    bad, rows = counts.get("quarantined", 0), counts.get("rows_in", 0)
    if bad and bad > max_bad * rows:
        raise ContractError(
            f"{int(bad)} of {int(rows)} rows are unusable, more than --max-bad {max_bad:g}",
            f"see {ctx.work}/quarantine; mend them, or allow them: --max-bad {bad / max(rows, 1):.2g}",
        )


def _outputs(stage: Stage, ctx: Context, records: list[dict[str, Any]], single: bool) -> dict[str, Any]:
    """What is published: parts of the main table, side tables, every other file with its checksum."""
    listed = {file["path"]: file for record in records for file in record["files"]}
    parts = [listed[path] for path in sorted(listed) if path.startswith("data/")]
    if not single and stage.kind == "table" and parts:
        commit_file(ctx.work / "data" / "_SUCCESS", lambda to: to.touch())
    found: dict[str, Any] = {
        "contract": stage.output,
        "rows": sum(part["rows"] for part in parts),
        "bytes": sum(part["bytes"] for part in parts),
    }
    if parts:
        found["parts"] = parts
    quarantined = [listed[path] for path in sorted(listed) if path.startswith("quarantine/")]
    if quarantined:
        found["quarantine"] = quarantined
    others = []
    for path in _published_files(ctx.work):
        name = str(path.relative_to(ctx.work))
        if name.startswith("data/"):
            continue
        others.append(
            listed.get(name) or {"path": name, "bytes": path.stat().st_size, "sha256": sha256(path)}
        )
    if others:
        found["files"] = others
    return found


def _published_files(work: Path) -> list[Path]:
    return sorted(
        path
        for path in work.rglob("*")
        if path.is_file()
        and path.relative_to(work).parts[0] not in UNPUBLISHED
        and not path.name.startswith(".")
    )


def _content_digest(outputs: Mapping[str, Any]) -> str:
    import hashlib

    listed = [*outputs.get("parts", []), *outputs.get("files", [])]
    text = "".join(f"{file['path']}:{file['sha256']}\n" for file in sorted(listed, key=lambda f: f["path"]))
    return hashlib.sha256(text.encode()).hexdigest()


def _publish(stage: Stage, ctx: Context, manifest: Manifest, out: Path, single: bool) -> None:
    if single:
        whole = ctx.work / "_tmp" / "whole.parquet"
        whole.parent.mkdir(exist_ok=True)
        parts = [ctx.work / part["path"] for part in manifest.outputs["parts"]]
        record = manifest.model_dump(mode="json")
        footer = {**stage.footer(), "manifest": record}
        concat_parquet(
            parts,
            whole,
            contract=stage.output,
            compression=stage.compression,
            metadata=footer,
        )
        publish(whole, out)
        shutil.rmtree(ctx.work)
        return
    shutil.rmtree(ctx.work / "_tmp", ignore_errors=True)
    _side_manifests(stage, ctx, manifest)
    (ctx.work / "plan.json").unlink(missing_ok=True)
    commit_json(ctx.work / "manifest.json", manifest.model_dump(mode="json"))
    publish(ctx.work, out)


def _side_manifests(stage: Stage, ctx: Context, manifest: Manifest) -> None:
    """Give each side table a manifest of its own, so that it opens like any other output."""
    for name, contract in stage.tables.items():
        prefix = f"{name}/"
        parts = [
            {**file, "path": file["path"].removeprefix(prefix)}
            for file in manifest.outputs.get("files", [])
            if file["path"].startswith(prefix + "data/part-")
        ]
        if not parts:
            continue
        outputs = {
            "contract": contract,
            "rows": sum(part["rows"] for part in parts),
            "bytes": sum(part["bytes"] for part in parts),
            "parts": parts,
        }
        side = manifest.model_copy(
            update={
                "outputs": outputs,
                "content_digest": _content_digest(outputs),
                "data_cutoff": stage.table_cutoff(name, ctx, manifest.data_cutoff),
            }
        )
        commit_json(ctx.work / name / "manifest.json", side.model_dump(mode="json"))


def _dry_run(stage: Stage, out: Path, ctx: Context, work: str) -> Result:
    published = read_manifest(out) if out.exists() else None
    plan: dict[str, Any] = {
        "inputs": {role: {"path": str(t.path), "rows": t.rows} for role, t in ctx.inputs.items()},
    }
    if published and published.fingerprint == work:
        return Result("up to date", out, published, plan)
    stage.check(ctx)
    if stage.kind == "table":
        shards = list(stage.plan(ctx))
        done = sum(_committed(ctx.work, shard.index) is not None for shard in shards)
        plan |= {"shards": len(shards), "shards_done": done, "rows_in": sum(s.rows for s in shards)}
        plan |= stage.estimate(ctx, shards)
    if out.exists():
        plan["conflict"] = _conflict(out, published, stage)
    return Result("planned", out, None, plan)


def _conflict(out: Path, published: Manifest | None, stage: Stage) -> str:
    if published is None:
        return f"{out}: exists and was not written by prerank"
    if published.stage != stage.name:
        return f"{out}: exists and was written by {published.stage}"
    return f"{out}: exists, made from other inputs or parameters"


def _disk_fault(fault: OSError, partial: Path) -> PrerankError:
    if fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RetryError(
            f"{fault.filename or partial}: no space left; the finished shards stay",
            "free some space, then run the same line again",
        )
    if fault.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return PrerankError(
            f"{fault.filename or partial}: cannot be written ({fault.strerror})", "check the path"
        )
    return PrerankError(f"{fault.filename or partial}: {fault.strerror or fault}", "see the system's log")
