"""What of a work folder is published, with its checksums, and the last step: it appears under its name."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prerank_tools.run.commit import commit_file, commit_json, publish, sha256
from prerank_tools.run.manifest import Manifest
from prerank_tools.run.seal import BLANK, KEY, seal
from prerank_tools.stage import Context, Stage
from prerank_tools.tables.parquet import concat_parquet

# What belongs to the run and not to the result.
UNPUBLISHED = ("manifest.json", "shards", "_tmp", "plan.json", "quarantine")


def outputs_of(stage: Stage, ctx: Context, records: list[dict[str, Any]], single: bool) -> dict[str, Any]:
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
    for path in published_files(ctx.work):
        name = str(path.relative_to(ctx.work))
        if name.startswith("data/"):
            continue
        others.append(
            listed.get(name) or {"path": name, "bytes": path.stat().st_size, "sha256": sha256(path)}
        )
    if others:
        found["files"] = others
    return found


def published_files(work: Path) -> list[Path]:
    """Every file under a work folder that is published beside the tables."""
    return sorted(
        path
        for path in work.rglob("*")
        if path.is_file()
        and path.relative_to(work).parts[0] not in UNPUBLISHED
        and not path.name.startswith(".")
    )


def content_digest(outputs: Mapping[str, Any]) -> str:
    """sha256 over the names and checksums of all published files."""
    listed = [*outputs.get("parts", []), *outputs.get("files", [])]
    text = "".join(f"{file['path']}:{file['sha256']}\n" for file in sorted(listed, key=lambda f: f["path"]))
    return hashlib.sha256(text.encode()).hexdigest()


def publish_output(stage: Stage, ctx: Context, manifest: Manifest, out: Path, single: bool) -> None:
    """Let the finished work appear as `out`: a folder, or one file that joins all parts."""
    if single:
        whole = ctx.work / "_tmp" / "whole.parquet"
        whole.parent.mkdir(exist_ok=True)
        parts = [ctx.work / part["path"] for part in manifest.outputs["parts"]]
        record = manifest.model_dump(mode="json")
        footer = {**stage.footer(), "manifest": record, KEY: BLANK}
        concat_parquet(
            parts,
            whole,
            contract=stage.output,
            compression=stage.compression,
            metadata=footer,
        )
        seal(whole)
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
                "content_digest": content_digest(outputs),
                "data_cutoff": stage.table_cutoff(name, ctx, manifest.data_cutoff),
            }
        )
        commit_json(ctx.work / name / "manifest.json", side.model_dump(mode="json"))
