"""Training checkpoints: a folder a step of safetensors and JSON, valid once its record (written last) is.

No rename and no pickle: `record.json` lists every file with its sha256, so a folder that was cut off while
it was written, or damaged since, is not a checkpoint and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from prerank_tools.errors import UsageError

RECORD = "record.json"
KEEP = 2  # the newest may be damaged, so the one before it stays


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder and what the loop noted in it."""

    path: Path
    step: int
    state: Mapping[str, Any]


def save(
    folder: Path, step: int, *, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> Checkpoint:
    """Write one checkpoint under `folder` and return it; `state` must be JSON."""
    path = folder / f"step-{step:09d}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    save_model(model, str(path / "model.safetensors"))
    groups = save_optimizer(optimizer, path / "optimizer.safetensors")
    files = {file.name: _digest(file) for file in sorted(path.iterdir())}
    record: dict[str, Any] = {"step": step, "files": files, "groups": groups, "state": dict(state)}
    _write_synced(path / RECORD, json.dumps(record, indent=1, sort_keys=True))
    _sync(path)
    _sync(folder)
    return Checkpoint(path, step, record["state"])


def latest(folder: Path) -> Checkpoint | None:
    """Newest whole checkpoint under `folder`, or None."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        record = _read_record(path)
        if record is not None:
            return Checkpoint(path, record["step"], record["state"])
    return None


def restore(
    checkpoint: Checkpoint, *, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a checkpoint's tensors back into the model and, where given, the optimiser."""
    load_model(model, str(checkpoint.path / "model.safetensors"), strict=True)
    if optimizer is not None:
        groups = json.loads((checkpoint.path / RECORD).read_text())["groups"]
        load_optimizer(optimizer, checkpoint.path / "optimizer.safetensors", groups)


def prune(folder: Path, *, protect: Iterable[int] = ()) -> None:
    """Delete all but the newest checkpoints and the protected steps."""
    kept = {f"step-{step:09d}" for step in protect}
    for path in sorted(folder.glob("step-*"), reverse=True)[KEEP:]:
        if path.name not in kept:
            shutil.rmtree(path)


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> list[dict[str, Any]]:
    """Flatten an optimiser's tensors to `<parameter>.<name>`; returns its groups' plain values, for JSON."""
    whole = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, entry in whole["state"].items()
        for name, value in entry.items()
    }
    save_file(tensors, str(path))
    return [
        {key: value for key, value in group.items() if key != "params"} for group in whole["param_groups"]
    ]


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path, groups: list[dict[str, Any]]) -> None:
    """Reverse of `save_optimizer`, onto an optimiser built over the same parameters."""
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(str(path)).items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = tensor
    current = optimizer.state_dict()["param_groups"]
    merged = [{**new, **old, "params": new["params"]} for new, old in zip(current, groups, strict=True)]
    optimizer.load_state_dict({"state": entries, "param_groups": merged})


def load_grown(model: nn.Module, path: Path) -> dict[str, list[str]]:
    """Start `model` from an earlier model's `model.safetensors`, allowing vocabularies to have grown.

    A tensor with more rows than before keeps the old rows and its own initial values for the new ones, so
    vocabularies must only ever be appended to. Returns the names `grown` and `fresh`; a tensor that shrank
    or changed its width raises UsageError.
    """
    source = path / "model.safetensors" if path.is_dir() else path
    old = load_file(str(source))
    report: dict[str, list[str]] = {"grown": [], "fresh": []}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name not in old:
                report["fresh"].append(name)
            elif _copy_rows(tensor, old[name], name, source):
                report["grown"].append(name)
    return report


def _copy_rows(tensor: torch.Tensor, old: torch.Tensor, name: str, source: Path) -> bool:
    if tensor.shape == old.shape:
        tensor.copy_(old)
        return False
    grown = tensor.dim() == old.dim() > 0 and tensor.shape[1:] == old.shape[1:] and len(tensor) > len(old)
    if not grown:
        raise UsageError(
            f"{source}: {name} has shape {tuple(old.shape)}, the model to train has {tuple(tensor.shape)}",
            "continue with the configuration of that model, or train a new one without --init-from",
        )
    tensor[: len(old)].copy_(old)
    return True


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((path / RECORD).read_text())
        whole = all(_digest(path / name) == digest for name, digest in record["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return record if whole else None


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_synced(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
