"""`quantize sid` on a GPU, Parquet to Parquet, beside reading and writing the same table; and its parts.

python benchmarks/gpu_sid.py --out "$OUT" --rows 2097152 --workers 4
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import torch
from gpu_assign import clustered, fit

from prerank_tools.quantizers.duplicates import row_hashes
from prerank_tools.quantizers.fit_stage import read_vectors
from prerank_tools.quantizers.residuals import level_errors
from prerank_tools.quantizers.rkmeans import RKMeans
from prerank_tools.quantizers.stage import QuantizeSids
from prerank_tools.run.job import RunOptions, run
from prerank_tools.tables.table import open_table, shards_of
from prerank_tools.tables.vectors import numpy_to_vectors

DIMS, SIZE, PART = 512, 256, 1 << 18


def main() -> None:
    """Make the table, time both paths in turn, then the parts of one shard."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--out", type=Path, default=Path())
    words.add_argument("--rows", type=int, default=1 << 21)
    words.add_argument("--workers", type=int, default=4)
    words.add_argument("--rounds", type=int, default=2)
    given = words.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="gpu_sid_"))
    codebook = make(folder, given.rows)
    wall = alternate(folder, given.workers, given.rounds)
    lines = [
        f"# `quantize sid` Parquet to Parquet, {given.rows:,} x {DIMS} float16, 3 x {SIZE}", "",
        f"{torch.cuda.get_device_name()}, {len(os.sched_getaffinity(0))} CPU cores, {given.workers} workers "
        f"of 1 thread; torch {torch.__version__}, polars {pl.__version__}, "
        f"Python {platform.python_version()}, {datetime.now(UTC):%F}, seed 0. "
        f"Fastest of {given.rounds}, turn by turn.", "",
        "| path | seconds | rows/s |", "|---|---|---|",
        *(f"| {name} | {min(s):.2f} | {given.rows / min(s):,.0f} |" for name, s in wall.items()), "",
        "## One shard of 65,536 rows in one process", "",
        "| part | ms | rows/s |", "|---|---|---|",
        *(f"| {name} | {ms:.1f} | {rows / ms * 1e3:,.0f} |" for name, ms, rows in parts(folder, codebook)),
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu_sid.md").write_text(text)
    print(text)
    shutil.rmtree(folder)


def make(folder: Path, rows: int) -> RKMeans:
    """The table in parts and a codebook fitted on its first rows."""
    torch.manual_seed(0)
    (folder / "emb").mkdir()
    x_ND = clustered(rows, DIMS, decay=0.5)
    quantizer = RKMeans(sizes=(SIZE,) * 3, codebooks=tuple(fit(x_ND[: 1 << 19], SIZE, iterations=10)))
    quantizer.to_codebook().save(folder / "codebook")
    for first in range(0, rows, PART):
        x_nD = x_ND[first : first + PART].cpu().numpy()
        ids = pl.Series("item_id", np.arange(first, first + len(x_nD)))
        frame = pl.DataFrame([ids, numpy_to_vectors("embedding", x_nD)])
        write(frame, folder / "emb" / f"part-{first // PART:05d}.parquet")
    return quantizer


def write(frame: pl.DataFrame, path: Path) -> None:
    """As the stages write vectors."""
    frame.write_parquet(path, compression="uncompressed", row_group_size=16_384)


def alternate(folder: Path, workers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of the stage and of a copy of the table, in turn."""

    def stage() -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        work = QuantizeSids(folder / "emb", codebook=folder / "codebook")
        run(work, folder / "out", RunOptions(workers=workers, threads=1, device="cuda", gate="warn"))

    def rewrite() -> None:
        shutil.rmtree(folder / "copy", ignore_errors=True)
        (folder / "copy").mkdir()
        for path in sorted((folder / "emb").iterdir()):
            write(pl.read_parquet(path), folder / "copy" / path.name)

    wall: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, path in (("quantize sid", stage), ("read and write the table", rewrite)):
            started = time.perf_counter()
            path()
            wall.setdefault(name, []).append(time.perf_counter() - started)
    return wall


def parts(folder: Path, quantizer: RKMeans) -> list[tuple[str, float, int]]:
    """What a shard's time goes to, each the fastest of three."""
    shard = shards_of(open_table(folder / "emb", "item_embeddings"))[0]
    _, x_ND, _ = read_vectors(shard)
    codes_NL = quantizer.encode(x_ND, threads=1, device="cuda")

    def fastest(work: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times) * 1e3

    works: dict[str, Callable[[], object]] = {
        "read and check the rows": lambda: read_vectors(shard),
        "codes, on the GPU, copies there and back included": lambda: quantizer.encode(x_ND, device="cuda"),
        "error after every level, on one core": lambda: level_errors(quantizer, x_ND, codes_NL),
        "hashes for the duplicate floor, on one core": lambda: row_hashes(x_ND),
    }
    return [(name, fastest(work), len(x_ND)) for name, work in works.items()]


if __name__ == "__main__":
    main()
