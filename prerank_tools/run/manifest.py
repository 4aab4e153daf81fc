"""The manifest: what was made, from what, how, with which versions, how long, how good."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from prerank_tools.errors import ContractError
from prerank_tools.stage import Context, Stage
from prerank_tools.tables.table import Folder, Table
from prerank_tools.version import VERSION

LIBRARIES = ("faiss-cpu", "numba", "numpy", "polars", "scikit-learn", "torch", "transformers")


class Manifest(BaseModel):
    """`manifest.json` of an output folder; the same record sits in the footer of a single-file output.

    Two runs of the same work differ in `timing` and `invocation` alone.
    """

    model_config = ConfigDict(extra="forbid")

    manifest_version: int = 1
    stage: str
    stage_version: int
    prerank_version: str = VERSION
    fingerprint: str  # of the work: stage, parameters, inputs
    content_digest: str = ""  # of the published bytes
    params: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    lineage: dict[str, str] = Field(default_factory=dict)
    data_cutoff: int | None = None
    outputs: dict[str, Any] = Field(default_factory=dict)
    counts: dict[str, int | float] = Field(default_factory=dict)
    quality: dict[str, Any] = Field(default_factory=dict)
    gates: list[dict[str, Any]] = Field(default_factory=list)
    environment: dict[str, Any] = Field(default_factory=dict)
    timing: dict[str, Any] = Field(default_factory=dict)
    invocation: dict[str, Any] = Field(default_factory=dict)


def fingerprint(stage: Stage, inputs: Mapping[str, Table | Folder]) -> str:
    """sha256 of the work: stage name and version, parameters, input digests; not engine, workers or paths."""
    work = {
        "stage": stage.name,
        "version": stage.version,
        "params": dict(stage.params()),
        "inputs": {role: table.digest for role, table in inputs.items()},
    }
    return hashlib.sha256(json.dumps(work, sort_keys=True, default=str).encode()).hexdigest()


def describe_inputs(inputs: Mapping[str, Table | Folder]) -> dict[str, dict[str, Any]]:
    """What a manifest says of each input."""
    return {
        role: {
            "contract": table.contract,
            "rows": table.rows,
            "digest": table.digest,
            "data_cutoff": table.data_cutoff,
            "fingerprint": table.manifest.get("fingerprint") if table.manifest else None,
        }
        for role, table in inputs.items()
    }


def environment(ctx: Context) -> dict[str, Any]:
    """Versions and machine that can change the last bits of a float."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": sys.platform,
        "cpu": cpu_model(),
        "device": ctx.device,
        "threads": ctx.threads,
        "libraries": versions,
    }


def cpu_model() -> str:
    """The processor's name as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def read_manifest(out: Path) -> Manifest | None:
    """The manifest of a published output, None where there is none.

    Raises ContractError where it cannot be read.
    """
    from prerank_tools.tables.parquet import read_footer

    try:
        if (out / "manifest.json").is_file():
            return Manifest.model_validate_json((out / "manifest.json").read_bytes())
        if out.is_file() and out.suffix == ".parquet":
            record = read_footer(out).get("manifest")
            return Manifest.model_validate(record) if record else None
    except ValueError as fault:
        raise ContractError(f"{out}: its manifest is damaged", "write it again with --overwrite") from fault
    return None
