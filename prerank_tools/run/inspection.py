"""Describe an output from its manifest, check its bytes, compare it with another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.run.commit import sha256
from prerank_tools.run.manifest import Manifest, read_manifest
from prerank_tools.run.seal import is_whole
from prerank_tools.tables.parquet import read_faults

SAME_RUN = ("timing", "invocation")


def describe(path: Path, *, verify: bool = False, compare_to: Path | None = None) -> dict[str, Any]:
    """The manifest as one mapping; with `verify` every file is read against its checksum.

    Raises ContractError where a file is missing or its bytes differ.
    """
    manifest = _manifest(path)
    found = manifest.model_dump(mode="json", exclude={"outputs"})
    outputs = {key: value for key, value in manifest.outputs.items() if not isinstance(value, list)}
    found["outputs"] = outputs | {"parts": len(manifest.outputs.get("parts", []))}
    if verify:
        found["verified_files"] = _verify(path, manifest)
    if compare_to is not None:
        found["differs"] = dict(_differences(manifest, _manifest(compare_to)))
    return found


def _manifest(path: Path) -> Manifest:
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder", "name an output of prerank")
    with read_faults(str(path)):
        manifest = read_manifest(path)
    if manifest is None:
        raise ContractError(f"{path}: holds no manifest", "is it an output of prerank, and finished?")
    return manifest


def _verify(path: Path, manifest: Manifest) -> int:
    if path.is_file():
        if not is_whole(path):
            raise _damaged(path)
        return 1
    listed = [
        *manifest.outputs.get("parts", []),
        *manifest.outputs.get("files", []),
        *manifest.outputs.get("quarantine", []),
    ]
    for file in listed:
        place = path / file["path"]
        if not place.is_file():
            raise ContractError(f"{place}: missing", "write the output again with --overwrite")
        if place.stat().st_size != file["bytes"] or sha256(place) != file["sha256"]:
            raise _damaged(place)
    return len(listed)


def _damaged(path: Path) -> ContractError:
    return ContractError(
        f"{path}: its bytes are not those that were written", "write the output again with --overwrite"
    )


def _differences(one: Manifest, other: Manifest) -> Iterator[tuple[str, list[Any]]]:
    left, right = (_flat(m.model_dump(mode="json", exclude={"outputs", *SAME_RUN})) for m in (one, other))
    for key in sorted({**left, **right}):
        if left.get(key) != right.get(key):
            yield key, [left.get(key), right.get(key)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
