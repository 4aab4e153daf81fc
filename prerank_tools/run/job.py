"""Run a stage: plan, map, reduce, publish. Runs again where a killed one stopped."""

from __future__ import annotations

import errno
import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from uuid import uuid4

import polars as pl

from prerank_tools.engines import torchrun
from prerank_tools.errors import ConflictError, ContractError, PrerankError, RetryError, UsageError
from prerank_tools.run.dry_run import conflict, dry_run
from prerank_tools.run.estimate import PeakMemory
from prerank_tools.run.gates import compare
from prerank_tools.run.lock import Lock
from prerank_tools.run.manifest import Manifest, describe_inputs, environment, fingerprint, read_manifest
from prerank_tools.run.mapping import follow_map, hold_bad, map_stage, open_work, reduce_stage
from prerank_tools.run.options import Result, RunOptions
from prerank_tools.run.publishing import content_digest, outputs_of, publish_output
from prerank_tools.run.threads import fix_threads
from prerank_tools.run.worker import check_unchanged, summed
from prerank_tools.stage import Context, Stage
from prerank_tools.tables.parquet import read_faults
from prerank_tools.tables.table import Folder, Table, open_folder, open_table


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
    with PeakMemory() if options.dry_run else nullcontext() as memory:
        ctx = _context(stage, out, options)
        work = fingerprint(stage, ctx.inputs)
        fix_threads(options.threads)
        if memory is not None:
            return dry_run(stage, out, ctx, work, memory)
    if options.engine == "torchrun" and not torchrun.in_group():
        workers, error_file = options.workers_on(ctx.device), ctx.work.with_suffix(".error")
        torchrun.launch(options.argv[1:], workers=workers, error_file=error_file)
        return Result("done", out, read_manifest(out))
    if torchrun.in_group():
        torchrun.stop_with_parent()
    if torchrun.rank() > 0:
        return _follow(stage, out, ctx, options)
    with Lock(out):
        return _locked(stage, out, ctx, options, work, single)


def _context(stage: Stage, out: Path, options: RunOptions) -> Context:
    return Context(
        work=out.parent / f".{out.name}.partial",
        threads=options.threads,
        device=resolve_device(options.device),
        log=options.log,
        inputs=open_inputs(stage),
        gate=options.gate,
    )


def _locked(stage: Stage, out: Path, ctx: Context, options: RunOptions, work: str, single: bool) -> Result:
    published = _published(out, options)
    if published and published.fingerprint == work:
        shutil.rmtree(ctx.work, ignore_errors=True)
        torchrun.announce(None)
        return Result("up to date", out, published)
    if out.exists() and not options.overwrite:
        raise ConflictError(conflict(out, published, stage), "add --overwrite, or name another output")
    stage.check(ctx)
    try:
        manifest = _work(stage, ctx, options, work, single)
        check_unchanged(ctx)
        publish_output(stage, ctx, manifest, out, single)
    except OSError as fault:
        raise _disk_fault(fault, ctx.work) from fault
    return Result("done", out, manifest)


def _published(out: Path, options: RunOptions) -> Manifest | None:
    """What is there already; what cannot be read is nothing, where it may be replaced."""
    try:
        return read_manifest(out) if out.exists() else None
    except (ContractError, pl.exceptions.PolarsError, pl.exceptions.PanicException):
        if options.overwrite:
            return None
        raise


def _follow(stage: Stage, out: Path, ctx: Context, options: RunOptions) -> Result:
    """What a rank other than 0 does: a share of the shards, or its part in a training; it never publishes."""
    left = torchrun.announced()
    if left is None:
        return Result("followed", out, None)
    if stage.kind == "table":
        shards = {shard.index: shard for shard in stage.plan(ctx)}
        follow_map(stage, ctx, options, [shards[index] for index in left])
    else:
        own = ctx.work / "_tmp" / f"rank{torchrun.rank()}"
        own.mkdir(parents=True, exist_ok=True)
        log = partial(options.log, worker=torchrun.rank())
        stage.build(replace(ctx, work=own, shared_scratch=ctx.work / "_tmp", log=log))
    return Result("followed", out, None)


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
        open_work(ctx, work, shards)
        records = map_stage(stage, ctx, options, shards)
        records = reduce_stage(stage, ctx, records)
        counts = summed(records)
        hold_bad(ctx, counts, options.max_bad)
        quality = dict(stage.quality(counts, ctx))
    else:
        open_work(ctx, work, [])
        torchrun.announce([])
        quality, counts, records = dict(stage.build(ctx)), {}, []
    manifest = Manifest(
        stage=stage.name,
        stage_version=stage.version,
        fingerprint=work,
        params=json.loads(json.dumps(dict(stage.params()), default=str)),
        inputs=describe_inputs(ctx.inputs),
        lineage=dict(stage.lineage(ctx)),
        data_cutoff=stage.data_cutoff(ctx),
        outputs=outputs_of(stage, ctx, records, single),
        counts=counts,
        quality=json.loads(json.dumps(quality, default=float)),
        environment=environment(ctx),
    )
    manifest.content_digest = content_digest(manifest.outputs)
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
        "workers": options.workers_on(ctx.device),
        "inputs": {role: str(table.path) for role, table in ctx.inputs.items()},
    }
    return manifest


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
