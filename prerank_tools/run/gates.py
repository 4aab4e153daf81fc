"""Day-over-day gates: hold tonight's manifest against last night's before anything is published."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from prerank_tools.errors import UsageError
from prerank_tools.run.manifest import Manifest, read_manifest
from prerank_tools.stage import Context

# quality key -> (how it is compared, how far it may move)
LIMITS: dict[str, tuple[str, float]] = {
    "rows": ("relative", 0.2),
    "mean_norm": ("relative", 0.1),
    "missing_share": ("absolute", 0.05),
    "cold_share": ("absolute", 0.1),
    "stale_share": ("absolute", 0.1),
    "score_histogram": ("psi", 0.25),
}


def compare(tonight: Manifest, previous: Path, ctx: Context) -> None:
    """Hold each known number of both manifests against its limit (rows, norms, shares, score histogram).

    Raises GateError on the first that moved too far, unless the job runs with `--gate warn`.
    """
    before = read_manifest(previous)
    if before is None:
        raise UsageError(f"{previous}: holds no manifest to compare with", "name an output of prerank")
    now = {"rows": tonight.outputs.get("rows", 0), **tonight.quality}
    then = {"rows": before.outputs.get("rows", 0), **before.quality}
    for name, (how, limit) in LIMITS.items():
        if name not in now or name not in then:
            continue
        moved = distance(how, now[name], then[name])
        ctx.hold(
            name,
            passed=moved <= limit,
            message=f"{name} moved by {moved:.3g} ({how}) since {previous}, more than {limit:g}",
            hint="look at both with `prerank inspect`; publish anyway with --gate warn",
        )


def distance(how: str, now: Any, then: Any) -> float:
    """How far a number, or a histogram (population stability index), moved."""
    if how == "psi":
        return psi(now, then)
    moved = abs(now - then)
    return moved / max(abs(then), 1e-12) if how == "relative" else moved


def psi(now: list[float], then: list[float]) -> float:
    """Population stability index of two histograms over the same bins, empty bins floored at 1e-4."""
    total_now, total_then = sum(now) or 1, sum(then) or 1
    shares = [(max(a / total_now, 1e-4), max(b / total_then, 1e-4)) for a, b in zip(now, then, strict=True)]
    return sum((a - b) * math.log(a / b) for a, b in shares)
