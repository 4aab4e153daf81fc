"""Seconds of every collision policy: 100 k heavily skewed rows beside GRID's way, and ten million rows.

python benchmarks/collisions.py --out benchmarks/results/collisions.md
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from peers.grid_dedup import number_by_scans
from quantizers_page import cpu

from prerank_tools.quantizers.collisions import Resolved, resolve
from prerank_tools.quantizers.sid_keys import pack_codes

ROUNDS = 3
SIZES = (256, 256, 256)
LAST_KD = np.random.default_rng(1).standard_normal((256, 32)).astype(np.float32)
RESIDUAL_ND = np.random.default_rng(2).standard_normal((1 << 20, 32)).astype(np.float32)


def main() -> None:
    """Measure and write the table; each policy once to compile, then timed."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--rows", type=int, default=10_000_000)
    args = words.parse_args()
    small = skewed(100_000)
    lines = [
        "# Collision policies",
        "",
        f"`{' '.join(['python', *sys.argv])}`, {time.strftime('%Y-%m-%d')}, numpy {np.__version__}, {cpu()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start. Seconds: median of {ROUNDS} "
        "(lowest to highest); one run of the scans.",
        "",
        "Skewed: Zipf 1.3 codes at three levels of 256, so the fullest SIDs hold thousands of items.",
        "",
        "| policy | rows | seconds | moved | left over capacity |",
        "|---|---|---|---|---|",
    ]
    seconds, suffix_N = timed(lambda: number_by_scans(small))
    lines.append(f"| numbering by scans (GRID's way) | 100,000 | {seconds:.2f} | - | - |")
    for policy in ("suffix", "capacity", "optimal"):
        run_policy(policy, small[:2_000])
        seconds, found = repeated(lambda policy=policy: run_policy(policy, small))
        lines.append(f"| {policy} | 100,000 | {seconds} | {found.moved} | {found.unresolved} |")
        if policy == "suffix" and not np.array_equal(np.sort(suffix_N), np.sort(found.suffix_N)):
            raise SystemExit("the two numberings differ")
    large = np.minimum((np.random.default_rng(0).random((args.rows, 3)) ** 2 * 256).astype(np.int32), 255)
    for policy in ("suffix", "capacity"):
        seconds, found = repeated(lambda policy=policy: run_policy(policy, large))
        lines.append(f"| {policy} | {args.rows:,} | {seconds} | {found.moved} | {found.unresolved} |")
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def skewed(rows: int) -> np.ndarray:
    """Codes whose counts follow a power law."""
    return np.minimum(np.random.default_rng(0).zipf(1.3, size=(rows, 3)) - 1, 255)


def run_policy(policy: str, codes_NL: np.ndarray) -> Resolved:
    """One policy over shuffled ids, with made-up residuals where it moves items."""
    ids_N = np.random.default_rng(3).permutation(len(codes_NL))
    return resolve(
        pack_codes(codes_NL, SIZES),
        ids_N,
        sizes=SIZES,
        policy=policy,  # type: ignore[arg-type]
        distances=lambda rows: (LAST_KD**2).sum(1) - 2 * RESIDUAL_ND[rows & 0xFFFFF] @ LAST_KD.T,
        width=1 << 20,
        capacity=5,
    )


def repeated(work: Callable[[], Any]) -> tuple[str, Any]:
    """Median of the seconds, with their range, and the last result."""
    runs = [timed(work) for _ in range(ROUNDS)]
    seconds = [run[0] for run in runs]
    return f"{median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})", runs[-1][1]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
