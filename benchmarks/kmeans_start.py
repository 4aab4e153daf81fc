"""Starts of k-means, random rows or ever more axes, on faiss and on a GPU: error, full codes, seconds.

    python benchmarks/kmeans_start.py [--device cuda] [--threads 2] [--repeats 3] --out FILE.md

Vectors are those of generate.py (noise around 1,000 centres) and ones with a falling spectrum and far
outliers, as residuals of real embeddings have.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

SIZES = (256, 256, 256)
SHAPES = ((100_000, 256), (100_000, 512))


def main() -> None:
    """Fit every start on every set, in turn, and write the page."""
    import faiss
    import torch

    from prerank_tools.run.manifest import cpu_model

    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--device", default="cpu")
    words.add_argument("--threads", type=int, default=2)
    words.add_argument("--repeats", type=int, default=3)
    words.add_argument("--out", type=Path, required=True)
    args = words.parse_args()
    card = f", {torch.cuda.get_device_name()}" if args.device == "cuda" else ""
    lines = [
        "# Starts of k-means",
        "",
        f"`{' '.join(['python', *sys.argv])}`",
        "",
        f"{time.strftime('%Y-%m-%d')}; python {platform.python_version()}, torch {torch.__version__}, faiss "
        f"{faiss.__version__}, numpy {np.__version__}; {cpu_model()}, {os.cpu_count()} cores, {args.threads} "
        f"threads{card}.",
        f"RQ-KMeans, 3 x 256, 25 iterations, seeds 0 to {args.repeats - 1}: medians, the starts in turn. "
        "Error: sum of squares left, over that of the vectors; perplexity by level, the lowest of all seeds.",
        "",
        "| vectors | device | start | relative error | perplexity of 256 | fit s |",
        "|---|---|---|---|---|---|",
    ]
    starts = [("cpu", "random"), ("cpu", "progressive")]
    starts += [(args.device, init) for _, init in starts] if args.device != "cpu" else []
    for rows, dims in SHAPES:
        for name, x_ND in (("generated", generated(rows, dims)), ("spectrum", spectrum(rows, dims))):
            for device, init in starts[2:]:  # kernels and libraries load
                fit(x_ND[:10_000], init, 0, device, args.threads)
            found: dict[tuple[str, str], list[tuple[float, list[float], float]]] = {}
            for seed in range(args.repeats):
                for start in starts:
                    found.setdefault(start, []).append(fit(x_ND, start[1], seed, start[0], args.threads))
            for (device, init), runs in found.items():
                error, full, seconds = zip(*runs, strict=True)
                lowest = " ".join(f"{min(level):.0f}" for level in zip(*full, strict=True))
                line = f"| {name}, {rows:,} x {dims} | {device} | {init} | {median(error):.4f} | {lowest} "
                lines.append(f"{line}| {median(seconds):.2f} |")
                print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n")


def fit(
    x_ND: np.ndarray, init: str, seed: int, device: str, threads: int
) -> tuple[float, list[float], float]:
    """(relative error, perplexity by level, seconds) of one fit."""
    from prerank_tools.quantizers.rkmeans import RKMeans
    from prerank_tools.quantizers.sid_metrics import SidCounts

    began = time.perf_counter()
    fitted = RKMeans(sizes=SIZES, init=init).fit(x_ND, seed=seed, threads=threads, device=device)  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    codes_NL = fitted.encode(x_ND, threads=threads, device=device)
    left = ((x_ND - fitted.decode(codes_NL)) ** 2).sum(dtype=np.float64) / (x_ND**2).sum(dtype=np.float64)
    counts = SidCounts(SIZES)
    counts.update(codes_NL)
    return float(left), [level.perplexity for level in counts.finalize().levels], seconds


def generated(rows: int, dims: int) -> np.ndarray:
    """As generate.py: noise of 0.6 around 1,000 centres."""
    rng = np.random.default_rng(0)
    centre_KD = rng.standard_normal((1_000, dims), dtype=np.float32)
    return centre_KD[rng.integers(0, 1_000, rows)] + 0.6 * rng.standard_normal((rows, dims), dtype=np.float32)


def spectrum(rows: int, dims: int) -> np.ndarray:
    """Spread falling as 1 / sqrt(axis) in turned axes, one row in fifty three times as long."""
    rng = np.random.default_rng(1)
    x_ND = rng.standard_normal((rows, dims), dtype=np.float32) / np.sqrt(
        np.arange(1, dims + 1), dtype=np.float32
    )
    x_ND[::50] *= 3
    return x_ND @ np.linalg.qr(rng.standard_normal((dims, dims)))[0].astype(np.float32)


if __name__ == "__main__":
    main()
