"""`prerank eval sid` on a large catalogue: seconds and peak memory of every part of the judgement.

    python benchmarks/eval_sid.py --out benchmarks/results/eval_sid.md --rows 1000000

Vectors are clusters of clusters in 64 dims, float16; SIDs are those of `quantize sid` at 3 x 256.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import polars as pl

DIMS = 64


def main() -> None:
    """Make the catalogue, run each command on its own, write the table."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--rows", type=int, default=1_000_000)
    words.add_argument("--seed", type=int, default=0)
    args = words.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # In a process of its own: a child's peak memory counts from that of its parent.
        maker = get_context("spawn").Process(target=make, args=(folder, args.rows, args.seed))
        maker.start()
        maker.join()
        prerank("quantize", "sid", folder / "emb.parquet", "-o", folder / "sid")
        parts = {
            "collisions and use of codes": [],
            "+ purity and NMI of a category": ["--items", folder / "items.parquet", "--category", "topic"],
            "+ lift over 1 event an item": ["--events", folder / "events.parquet"],
            "reconstruction, duplicates, recall of 1,000": [*vectors(folder), "--queries", "1000"],
            "reconstruction, duplicates, recall of 10,000": vectors(folder),
        }
        rows = [(name, *prerank("eval", "sid", folder / "sid", *more)) for name, more in parts.items()]
    args.out.write_text(report(rows, args))


def vectors(folder: Path) -> list[str | Path]:
    """The flag that adds the vectors."""
    return ["--embeddings", folder / "emb.parquet"]


def make(folder: Path, rows: int, seed: int) -> None:
    """Items with a vector and a topic, and a log with a basket of three a user."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, 1_000, rows)
    fine_ND = rng.standard_normal((20_000, DIMS))[20 * topic + rng.integers(0, 20, rows)]
    x_ND = rng.standard_normal((1_000, DIMS))[topic] + 0.5 * fine_ND
    x_ND += 0.3 * rng.standard_normal((rows, DIMS))
    ids = pl.Series("item_id", np.arange(rows))
    vectors = pl.Series("embedding", x_ND.astype(np.float32)).cast(pl.Array(pl.Float32, DIMS))
    pl.DataFrame([ids, vectors]).write_parquet(folder / "emb.parquet")
    title = ids.cast(pl.String).alias("title")
    pl.DataFrame([ids, title, pl.Series("topic", topic)]).write_parquet(folder / "items.parquet")
    user_N = np.arange(rows) // 3
    by_topic = np.argsort(topic, kind="stable")
    log = {"user_id": user_N, "item_id": by_topic, "timestamp": 1_700_000_000 + user_N, "basket_id": user_N}
    pl.DataFrame(log).write_parquet(folder / "events.parquet")


def prerank(*words: str | Path) -> tuple[float, float]:
    """Seconds and peak MiB of one command."""
    start = time.perf_counter()
    line = [sys.executable, "-m", "prerank_cli", *map(str, words)]
    child = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1_024


def report(rows: list[tuple[str, float, float]], args: argparse.Namespace) -> str:
    """The page."""
    lines = [
        f"# Judging the SIDs of {args.rows:,} items",
        "",
        f"`{' '.join(['python', *sys.argv])}`, {time.strftime('%Y-%m-%d')}, polars {pl.__version__}, "
        f"numpy {np.__version__}, {os.cpu_count()} cores, seed {args.seed}. Whole commands, start included.",
        "",
        "| `prerank eval sid` | seconds | peak MiB |",
        "|---|---|---|",
        *(f"| {name} | {seconds:.1f} | {peak:.0f} |" for name, seconds, peak in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
