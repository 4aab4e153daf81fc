"""Make inputs of any size: N x 256 fp16 item embeddings, Zipf events, requests with candidates.

    python benchmarks/generate.py --data FOLDER --items 10000000 --events 10000000 --pairs 10000000

Everything is written part by part, so that memory does not grow with the size; equal seeds give equal bytes.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl

DIM = 256
PART = 500_000
START, DAY = 1_700_000_000, 86_400
DAYS = 30
CANDIDATES = 200


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--items", type=int, default=0, help="item embeddings")
    parser.add_argument("--events", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=0, help="request-candidate pairs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.items:
        embeddings(arguments.data / "embeddings", arguments.items, seed=arguments.seed)
    if arguments.events:
        events(arguments.data / "events", arguments.events, seed=arguments.seed)
    if arguments.pairs:
        requests(arguments.data / "requests", arguments.pairs, seed=arguments.seed)


def embeddings(folder: Path, size: int, *, dim: int = DIM, seed: int = 0) -> Path:
    """`size` fp16 vectors around 1,000 centres."""
    folder.mkdir(parents=True)
    starts = range(0, size, PART)
    work = [
        (folder / f"part-{part:04d}.parquet", start, min(PART, size - start))
        for part, start in enumerate(starts)
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(lambda one: _embedding_part(*one, dim=dim, seed=seed), work):
            pass
    return folder


def _embedding_part(path: Path, start: int, rows: int, *, dim: int, seed: int) -> None:
    centre_KD = np.random.default_rng(seed).standard_normal((1000, dim)).astype(np.float32)
    rng = np.random.default_rng((seed, start))
    x_ND = np.empty((rows, dim), dtype=np.float16)
    for at in range(0, rows, 16_384):  # in the cache, and without a second whole array
        x_nD = 0.6 * rng.standard_normal((min(16_384, rows - at), dim), dtype=np.float32)
        x_ND[at : at + len(x_nD)] = x_nD + centre_KD[rng.integers(0, len(centre_KD), len(x_nD))]
    frame = pl.DataFrame(
        {
            "item_id": np.arange(start, start + rows),
            "embedding": pl.Series("embedding", x_ND.reshape(-1)).reshape((rows, dim)),
        }
    )
    frame.write_parquet(path, compression="uncompressed")


def events(folder: Path, size: int, *, users: int = 0, items: int = 100_000, seed: int = 0) -> Path:
    """`size` events in daily parts: Zipf users and items; one user has 1 % of them."""
    folder.mkdir(parents=True)
    users = users or max(10, size // 20)
    for day in range(DAYS):
        rng = np.random.default_rng((seed, day))
        rows = size // DAYS
        user_n = zipf(rows, users, rng)
        user_n[rng.random(rows) < 0.01] = users
        frame = pl.DataFrame(
            {
                "user_id": user_n,
                "item_id": zipf(rows, items, rng),
                "timestamp": START + day * DAY + rng.integers(0, DAY, rows),
                "action": pl.Series(np.array(["click", "purchase"])[(rng.random(rows) < 0.1).astype(int)]),
            }
        )
        frame.write_parquet(folder / f"day-{day:02d}.parquet")
    return folder


def requests(
    folder: Path,
    pairs: int,
    *,
    users: int = 0,
    items: int = 100_000,
    candidates: int = CANDIDATES,
    seed: int = 0,
) -> Path:
    """Requests of `candidates` items each, `pairs` in all, on the day after the log."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng((seed, 1))
    rows = max(1, pairs // candidates)
    users = users or rows
    for part, start in enumerate(range(0, rows, PART // candidates)):
        size = min(PART // candidates, rows - start)
        # Distinct inside a request: a random start and an odd stride walk through the items.
        first_n, stride_n = rng.integers(0, items, size), 2 * rng.integers(1, 1000, size) + 1
        offered = (first_n[:, None] + stride_n[:, None] * np.arange(candidates)) % items
        frame = pl.DataFrame(
            {
                "request_id": np.arange(start, start + size),
                "user_id": rng.integers(0, users, size),
                "timestamp": START + DAYS * DAY + rng.integers(0, DAY, size),
                "candidates": pl.Series(offered, dtype=pl.Array(pl.Int64, candidates)).cast(
                    pl.List(pl.Int64)
                ),
            }
        )
        frame.write_parquet(folder / f"part-{part:04d}.parquet")
    return folder


def zipf(rows: int, ids: int, rng: np.random.Generator, *, exponent: float = 0.8) -> np.ndarray:
    """Ids 0 .. ids-1, scattered, with P(rank) falling as rank^-exponent."""
    rank_n = (ids * rng.random(rows) ** (1 / (1 - exponent))).astype(np.int64)
    return (rank_n * 2_654_435_761) % ids


if __name__ == "__main__":
    main()
