"""What `--dry-run` says: the plan, what is done of it, what the rest will take. Nothing stays written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prerank_tools.run.estimate import PeakMemory, estimate
from prerank_tools.run.manifest import Manifest, read_manifest
from prerank_tools.run.mapping import committed
from prerank_tools.run.options import Result
from prerank_tools.stage import Context, Stage


def dry_run(stage: Stage, out: Path, ctx: Context, work: str, memory: PeakMemory) -> Result:
    """The plan of a stage; for a table its shards, rows, bytes and memory as `estimate` finds them."""
    published = read_manifest(out) if out.exists() else None
    plan: dict[str, Any] = {
        "inputs": {role: {"path": str(t.path), "rows": t.rows} for role, t in ctx.inputs.items()},
    }
    if published and published.fingerprint == work:
        return Result("up to date", out, published, plan)
    stage.check(ctx)
    if stage.kind == "table":
        shards = list(stage.plan(ctx))
        done = sum(committed(ctx.work, shard.index) is not None for shard in shards)
        plan |= {"shards": len(shards), "shards_done": done, "rows_in": sum(s.rows for s in shards)}
        plan |= estimate(stage, ctx, shards, memory)
    if out.exists():
        plan["conflict"] = conflict(out, published, stage)
    return Result("planned", out, None, plan)


def conflict(out: Path, published: Manifest | None, stage: Stage) -> str:
    """Why an output that is there cannot be taken for this work's."""
    if published is None:
        return f"{out}: exists and was not written by prerank"
    if published.stage != stage.name:
        return f"{out}: exists and was written by {published.stage}"
    return f"{out}: exists, made from other inputs or parameters"
