"""The results page of quantizers.py: its rows as tables."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from title_vectors import CATALOGUES

K = 256
SHAPES = ((K,) * 3, (K,) * 4)
QUERIES = 5_000
KINDS = (
    "RQ-KMeans",
    "RQ-KMeans, random start",
    "RQ-KMeans, refined",
    "RQ-KMeans, refined, beam 5",
    "RQ-KMeans, refined, beam 16",
    "balanced RQ-KMeans (last)",
    "RQ-KMeans+",
    "RQ-KMeans + FSQ",
    "RQ-VAE",
    "OPQ",
    "random hash",
    "faiss RQ, beam 1",
    "faiss RQ, beam 5",
    "faiss RQ, beam 16",
    "faiss PQ",
    "lucidrains ResidualVQ",
)
PEERS = {kind for kind in KINDS if kind.startswith(("faiss", "lucidrains"))}


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """One table a catalogue and shape: medians over seeds, the spread of error and recall beside them."""
    import faiss
    import torch

    lines = [
        "# Quality of every quantizer, beside its peers",
        "",
        f"`{' '.join(['python', *sys.argv])}`",
        "",
        f"{time.strftime('%Y-%m-%d')}; torch {torch.__version__}, faiss {faiss.__version__}, {cpu()}, "
        f"{os.cpu_count()} cores, {args.workers} worker(s) of {args.threads} threads, device {args.device}.",
        "Medians over the seeds, (lowest to highest) where given. Error: sum of squares over that of the "
        f"vectors. Recall: neighbour recall@10 of {QUERIES} items, both sides decoded, ties by chance. "
        "Collisions: above the share of items with an equal title. Used: fewest codes of a level. Purity: "
        "articleType of the first code; lift: items in a row of one user share the first code, over chance.",
    ]
    held = [row for row in rows if row["held_out"]]
    rows = [row for row in rows if not row["held_out"]]
    for name in CATALOGUES:
        for shape in SHAPES:
            ours = [row for row in rows if row["catalogue"] == name and row["levels"] == len(shape)]
            if ours:
                lines += ["", f"## {name}, {len(shape)} x {K}", "", *table(ours, args.seeds)]
    lines += ["", "## The quickest of ours that errs no more than a peer", "", *quickest(rows, args.seeds)]
    vae = [row for row in rows if row["kind"] == "RQ-VAE" and row["levels"] == 3]
    if len({row["seed"] for row in vae}) > args.seeds:
        lines += ["", "## RQ-VAE, every seed, 3 x 256", "", *collapse(vae)]
    if held:
        lines += ["", "## Items that were not fitted, 3 x 256", "", *unseen(held)]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]], seeds: int) -> list[str]:
    """Markdown rows in the order of KINDS."""
    meaning = "purity" if "purity_1" in rows[0] else "lift"
    lines = [
        "| quantizer | seeds | relative error | recall@10 | collisions | used | perplexity "
        f"| {meaning} | fit s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        ours = [row for row in rows if row["kind"] == kind and row["seed"] < seeds]
        if not ours:
            continue
        levels = [f"{median(level):.0f}" for level in zip(*(row["perplexity"] for row in ours), strict=True)]
        lines.append(
            f"| {kind} | {len(ours)} | {spread(ours, 'relative_error')} | {spread(ours, 'recall')} "
            f"| {median(row['collision_above_floor'] for row in ours):.4f} "
            f"| {min(min(row['used']) for row in ours)} | {' '.join(levels)} "
            f"| {median(row[f'{meaning}_1'] for row in ours):.3f} "
            f"| {median(row['fit_seconds'] for row in ours):.1f} |"
        )
    return lines


def quickest(rows: list[dict[str, Any]], seeds: int) -> list[str]:
    """For every peer: the row of ours with the fewest fit seconds among those of its error or less."""
    lines = [
        "By medians; an error within one in a thousand counts as equal.",
        "",
        "| catalogue, levels | peer | error | fit s | ours | error | fit s | ours over theirs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, levels in [(name, len(shape)) for name in CATALOGUES for shape in SHAPES]:
        found = {}
        for kind in KINDS:
            same = [
                row for row in rows if (row["catalogue"], row["levels"], row["kind"]) == (name, levels, kind)
            ]
            if same := [row for row in same if row["seed"] < seeds]:
                found[kind] = [median(row[of] for row in same) for of in ("fit_seconds", "relative_error")]
        for peer in (kind for kind in found if kind in PEERS):
            seconds, error = found[peer]
            fits = [(*found[kind], kind) for kind in found if kind not in PEERS]
            fits = [fit for fit in fits if fit[1] <= 1.001 * error]
            if not fits:
                continue
            our_seconds, our_error, kind = min(fits)
            lines.append(
                f"| {name}, {levels} | {peer} | {error:.4f} | {seconds:.1f} "
                f"| {kind} | {our_error:.4f} | {our_seconds:.1f} | {our_seconds / seconds:.2f} |"
            )
    return lines


def unseen(rows: list[dict[str, Any]]) -> list[str]:
    """Relative error of the fitted nine tenths of the titles, and of the tenth left out."""
    lines = [
        "Fitted on nine tenths of the titles (one seed): relative error of those, and of the tenth left out.",
        "",
        "| quantizer | " + " | ".join(f"{name}: fitted | left out" for name in CATALOGUES) + " |",
        "|---" * (1 + 2 * len(CATALOGUES)) + "|",
    ]
    found = {(row["kind"], row["catalogue"]): row for row in rows}
    for kind in KINDS:
        ours = [found.get((kind, name)) for name in CATALOGUES]
        cells = [
            f"{row['error_fitted']:.4f} | {row['error_left_out']:.4f}" if row else "- | -" for row in ours
        ]
        lines += [f"| {kind} | " + " | ".join(cells) + " |"] if any(ours) else []
    return lines


def collapse(rows: list[dict[str, Any]]) -> list[str]:
    """Fewest codes and lowest perplexity of RQ-VAE over all seeds."""
    lines = [
        "Asked for in every seed: 231 of 256 codes in use and perplexity 128 at every level.",
        "",
        "| catalogue | seeds | fewest used by level | lowest perplexity by level | seeds that pass |",
        "|---|---|---|---|---|",
    ]
    for name in CATALOGUES:
        ours = [row for row in rows if row["catalogue"] == name]
        used = [min(level) for level in zip(*(row["used"] for row in ours), strict=True)]
        lowest = [f"{min(level):.0f}" for level in zip(*(row["perplexity"] for row in ours), strict=True)]
        passed = sum(min(row["used"]) >= 0.9 * K and min(row["perplexity"]) >= K / 2 for row in ours)
        lines.append(f"| {name} | {len(ours)} | {used} | {' '.join(lowest)} | {passed} |")
    return lines


def spread(rows: list[dict[str, Any]], name: str) -> str:
    """Median (lowest to highest)."""
    values = [row[name] for row in rows]
    return f"{median(values):.4f} ({min(values):.4f}-{max(values):.4f})"


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
