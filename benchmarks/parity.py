"""RQ-KMeans beside a plain loop of faiss `Kmeans`, search and subtraction, row for row, on both catalogues.

    python benchmarks/parity.py --vectors VECTORS --out benchmarks/results/parity.md

Also beside float64: distances from differences, in index order, the lowest code of equal ones.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import faiss
import numpy as np
from peers.faiss_residual import fit_loop, flat_loop
from quantizers_page import cpu
from title_vectors import CATALOGUES, load

from prerank_tools.quantizers.rkmeans import RKMeans

SIZES = (256, 256, 256)
NITER, SEED = 25, 0
NEAR_TIE = 1e-5  # between the two nearest squared distances


def main() -> None:
    """Fit both, count rows that differ, and those of them that no near tie explains."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--vectors", type=Path, required=True)
    words.add_argument("--out", type=Path, required=True)
    args = words.parse_args()
    faiss.omp_set_num_threads(1)
    rows = []
    for name in CATALOGUES:
        x_ND = load(name, args.vectors).x_ND
        codebooks = fit_loop(x_ND, SIZES, iterations=NITER, seed=SEED)
        theirs_NL = flat_loop(x_ND, codebooks)
        ours = RKMeans(sizes=SIZES, iterations=NITER, init="random").fit(x_ND, seed=SEED, threads=1)
        same = all(np.array_equal(a, b) for a, b in zip(ours.codebooks, codebooks, strict=True))
        ours_NL = ours.encode(x_ND, threads=1)
        differing = np.flatnonzero((ours_NL != theirs_NL).any(axis=1))
        unexplained = sum(
            not near_tie(x_ND[row], codebooks, ours_NL[row], theirs_NL[row]) for row in differing
        )
        wrong = int((ours_NL != oracle(x_ND, codebooks)).any(axis=1).sum())
        rows.append(f"| {name} | {len(x_ND):,} | {same} | {len(differing)} | {unexplained} | {wrong} |")
    lines = [
        "# RQ-KMeans beside a plain faiss loop and float64",
        "",
        f"`{' '.join(['python', *sys.argv])}`, {time.strftime('%Y-%m-%d')}, faiss {faiss.__version__}, numpy "
        f"{np.__version__}, {'x'.join(map(str, SIZES))}, {NITER} iterations, seed {SEED}, one thread; "
        f'{cpu()}. RQ-KMeans with `init = "random"`, the start that a plain loop has.',
        "",
        "| catalogue | rows | equal centroids | rows unlike faiss | of these, no near tie | unlike float64 |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    args.out.write_text("\n".join(lines) + "\n")


def oracle(x_ND: np.ndarray, codebooks: list[np.ndarray]) -> np.ndarray:
    """Codes from float64 differences."""
    r_ND, codes = x_ND.astype(np.float64), []
    for codebook_KD in codebooks:
        distance_KN = np.stack([np.square(r_ND - c_D.astype(np.float64)).sum(axis=1) for c_D in codebook_KD])
        codes.append(distance_KN.argmin(axis=0))
        r_ND = r_ND - codebook_KD[codes[-1]].astype(np.float64)
    return np.stack(codes, axis=1)


def near_tie(x_D: np.ndarray, codebooks: list[np.ndarray], ours_L: np.ndarray, theirs_L: np.ndarray) -> bool:
    """Whether the two nearest codes are within NEAR_TIE at the first level where the codes differ."""
    level = int((ours_L != theirs_L).argmax())
    r_D = x_D.astype(np.float64) - sum(codebooks[n][theirs_L[n]].astype(np.float64) for n in range(level))
    first, second = np.sort(np.square(codebooks[level] - r_D).sum(axis=1))[:2]
    return bool(second - first < NEAR_TIE)


if __name__ == "__main__":
    main()
