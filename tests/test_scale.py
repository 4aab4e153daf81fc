"""Memory that does not follow the size: the reduce of `quantize sid`, wide requests, long pasts of users."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from prerank_tools.tables.vectors import numpy_to_vectors

WATCHED = """
import threading, time
from pathlib import Path
from prerank_tools.run.job import RunOptions, run

peak, done = [0], threading.Event()

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)

def grown(stage, out):
    run(warm, Path(out + "-warm"), RunOptions(workers=1, gate="warn"))  # libraries and compiled kernels
    before = anonymous()
    threading.Thread(target=watch, daemon=True).start()
    run(stage, Path(out), RunOptions(workers=1, gate="warn"))
    done.set()
    print(max(peak[0] - before, 0.0))
"""


def grown_mb(folder: Path, stages: str) -> float:
    """Anonymous memory (MB) that the stage takes beyond a small run of its kind, in a process of its own."""
    code = WATCHED + textwrap.dedent(stages) + "\ngrown(stage, 'out')\n"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    )
    return float(told.stdout.split()[-1])


def embeddings(folder: Path, rows: int, *, dim: int = 8, parts: int = 1) -> None:
    """A table of item embeddings with ids 0 .. rows - 1."""
    folder.mkdir()
    for part, ids in enumerate(np.array_split(np.arange(rows), parts)):
        x_ND = np.random.default_rng(part).standard_normal((len(ids), dim)).astype(np.float32)
        frame = pl.DataFrame([pl.Series("item_id", ids), numpy_to_vectors("embedding", x_ND)])
        frame.write_parquet(folder / f"part-{part:03d}.parquet", compression="uncompressed")


def events(folder: Path, users: np.ndarray, *, items: int) -> None:
    """A log with one event for each entry of `users`."""
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "user_id": users,
            "item_id": rng.integers(0, items, len(users)),
            "timestamp": 1_700_000_000 + rng.integers(0, 30 * 86_400, len(users)),
        }
    )
    frame.write_parquet(folder)


def requests(path: Path, rows: int, candidates: int, *, items: int) -> None:
    """Requests of user 7, all with so many distinct candidates."""
    pl.DataFrame(
        {
            "request_id": np.arange(rows),
            "user_id": np.full(rows, 7),
            "timestamp": np.full(rows, 1_700_000_000 + 31 * 86_400),
            "candidates": [np.random.default_rng(row).permutation(items)[:candidates] for row in range(rows)],
        }
    ).write_parquet(path)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["keep", "suffix"])
def test_the_reduce_of_quantize_sid_takes_at_most_100_bytes_a_row(tmp_path: Path, policy: str) -> None:
    embeddings(tmp_path / "small", 70_000)
    embeddings(tmp_path / "large", 2_000_000, parts=4)
    stages = f"""
    from prerank_tools.quantizers.fit_stage import SidConfig
    from prerank_tools.quantizers.stage import QuantizeSids
    config = SidConfig(codes=64, levels=2, iterations=2, suffix_width=65536)
    warm = QuantizeSids(Path("small"), config=config)
    stage = QuantizeSids(
        Path("large"), codebook=Path("out-warm"), collisions="{policy}", config=config
    )
    """
    assert grown_mb(tmp_path, stages) * 2**20 < 100 * 2_000_000


@pytest.mark.slow
def test_a_request_of_100_000_candidates(tmp_path: Path) -> None:
    embeddings(tmp_path / "items", 100_000, dim=64)
    events(tmp_path / "log.parquet", np.arange(20_000) % 100, items=100_000)
    requests(tmp_path / "wide.parquet", 1, 100_000, items=100_000)
    requests(tmp_path / "narrow.parquet", 1, 100, items=100_000)
    stages = """
    from prerank_tools.gsu.stage import GsuTopK
    warm = GsuTopK(Path("narrow.parquet"), Path("log.parquet"), Path("items"))
    stage = GsuTopK(Path("wide.parquet"), Path("log.parquet"), Path("items"))
    """
    assert grown_mb(tmp_path, stages) < 600
    assert pl.read_parquet(tmp_path / "out/data/*.parquet").height == 100_000


@pytest.mark.slow
def test_a_user_with_a_million_events(tmp_path: Path) -> None:
    embeddings(tmp_path / "items", 50_000, dim=64)
    events(tmp_path / "heavy.parquet", np.full(1_000_000, 7), items=50_000)
    events(tmp_path / "light.parquet", np.arange(1_000) % 10, items=50_000)
    requests(tmp_path / "asked.parquet", 1, 200, items=50_000)
    search = """
    from prerank_tools.gsu.stage import GsuTopK
    warm = GsuTopK(Path("asked.parquet"), Path("light.parquet"), Path("items"))
    stage = GsuTopK(Path("asked.parquet"), Path("heavy.parquet"), Path("items"))
    """
    count = """
    from prerank_tools.features.stage import Features
    warm = Features(Path("light.parquet"), Path("asked.parquet"))
    stage = Features(Path("heavy.parquet"), Path("asked.parquet"))
    """
    assert grown_mb(tmp_path, search) < 400
    for out in ("out", "out-warm"):
        (tmp_path / out).rename(tmp_path / f"gsu-{out}")
    assert grown_mb(tmp_path, count) < 150
    features = pl.read_parquet(tmp_path / "out/user_features/data/*.parquet")
    assert features["count_all"].to_list() == [1_000_000]
