"""How to run a stage, and what came of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prerank_tools.run.manifest import Manifest


def no_progress(done: int, total: int, record: Mapping[str, Any]) -> None:
    """The default progress report."""


def no_log(event: str, **fields: Any) -> None:
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
    progress: Callable[[int, int, Mapping[str, Any]], None] = field(default=no_progress, compare=False)
    log: Callable[..., None] = field(default=no_log, compare=False)

    def workers_on(self, device: str) -> int:
        """Processes to use: as many as asked for, else one a GPU, else cores / threads."""
        if self.workers:
            return self.workers
        if device == "cuda":
            import torch

            return torch.cuda.device_count()
        return max(1, (os.cpu_count() or 1) // self.threads)


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
