"""What `--dry-run` says of rows, shards, bytes and memory is within a quarter of what then happens.

Generated tables of some 100,000 rows; every line is a process of its own whose anonymous memory is watched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from benchmarks import generate

ROOT = Path(__file__).parent.parent
ROWS, DIM, ITEMS, USERS = 120_000, 64, 20_011, 6_000  # a prime: candidates are then distinct
END = generate.START + generate.DAYS * generate.DAY
CUT = generate.START + 20 * generate.DAY
KNOBS = """
[train.user]
max_events = 16
[train.user.model]
width = 32
[train.user.training]
epochs = 1
[train.scorer.training]
epochs = 1
[quantize.sid]
iterations = 3
"""
LINES = {
    "partition": "data partition events --buckets 8",
    "append": "data partition events/day-00.parquet --append-to made_log",
    "split": f"data split events --at {CUT}",
    "requests": f"data requests events --items items --from {CUT}",
    "pairs": "data pairs --events events --items items --kind copurchase",
    "features": "data features --events events --requests asked",
    "tfidf": "embed items items",
    "next day": "embed items items --previous made_emb",
    "sid": "quantize sid vectors --config knobs.toml",
    "sid, frozen": "quantize sid vectors --codebook made_codebook",
    "gsu": "gsu topk --requests requests --events events --embeddings catalogue",
    "users": "embed users --events made_log --embeddings catalogue --model made_user "
    f"--as-of {CUT} --as-of {END}",
    "vectors": "export vectors vectors --format int8",
    "score": "score --requests requests --model made_scorer --items items --embeddings catalogue "
    "--events events",
}
MADE = {
    "made_log": "data partition events --buckets 8",
    "made_emb": "embed items items",
    "made_codebook": "train quantizer catalogue",
    "made_user": "train user --events few --embeddings catalogue --config knobs.toml",
    "made_scorer": "train scorer --requests learn --events few --items items --embeddings catalogue "
    "--config knobs.toml",
}
QUICK = ("features", "gsu", "sid, frozen")  # a prepare, a search, a reduce; the others take minutes


class World:
    """A folder of generated tables; what a line reads and another line makes is made when first wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generate.embeddings(folder / "vectors", ROWS, dim=DIM)
        generate.embeddings(folder / "catalogue", ITEMS, dim=DIM)
        generate.events(folder / "few", 3_000, items=ITEMS)
        generate.events(folder / "events", ROWS, users=USERS, items=ITEMS)
        for day in (folder / "events").iterdir():
            frame = pl.read_parquet(day).with_columns(
                basket_id=pl.col("user_id") * 1000 + pl.col("timestamp") // generate.DAY % 1000,
                action=pl.lit("purchase"),
            )
            frame.write_parquet(day)
        generate.requests(folder / "requests", 2 * ROWS, users=USERS, items=ITEMS)
        generate.requests(folder / "asked", ROWS // 5, users=USERS, items=ITEMS)
        self._learn()
        self._items()
        (folder / "knobs.toml").write_text(KNOBS)

    def _learn(self) -> None:
        generate.requests(self.folder / "learn", 10_000, users=100, items=ITEMS)
        for part in (self.folder / "learn").iterdir():
            frame = pl.read_parquet(part)
            labels = [[1] + [0] * (generate.CANDIDATES - 1)] * len(frame)
            frame = frame.with_columns(
                pl.col("timestamp") - 5 * generate.DAY,
                label_click=pl.Series(labels, dtype=pl.List(pl.Int8)),
            )
            frame.write_parquet(part)

    def _items(self) -> None:
        rng = np.random.default_rng(0)
        words = np.array([f"word{n}" for n in range(3_000)])
        titles = words[(rng.random((ITEMS, 7)) ** 3 * len(words)).astype(int)]
        (self.folder / "items").mkdir()
        frame = pl.DataFrame(
            {
                "item_id": np.arange(ITEMS),
                "title": [" ".join(row) for row in titles],
                "category": [f"kind {n % 37}" for n in range(ITEMS)],
            }
        )
        frame.write_parquet(self.folder / "items/part-0.parquet")

    def run(self, line: str, out: str, *more: str) -> tuple[dict[str, Any], int]:
        """The JSON result of a line and the peak of its anonymous memory, bytes."""
        for name in MADE:
            if name in line.split() and not (self.folder / name).exists():
                self.run(MADE[name], name)
        how = ["-o", out, "--json", "--workers", "1", "--threads", "2", "--device", "cpu", *more]
        process = subprocess.Popen(
            [sys.executable, "-m", "prerank_cli", *line.split(), *how],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.005)
        assert process.returncode == 0 and process.stdout is not None, line
        return json.loads(process.stdout.read()), peak


def anonymous(pid: int) -> int:
    """RssAnon of a process, bytes; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Tables of some 100,000 rows."""
    return World(tmp_path_factory.mktemp("dry"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LINES]
)
def test_what_is_planned_happens_within_a_quarter(world: World, name: str) -> None:
    if name == "gsu":  # compiled by whoever comes first on a machine: that is neither planned nor repeated
        world.run(LINES[name].replace("requests requests", "requests asked"), "compiled")
    out = "out_" + name.replace(" ", "_").replace(",", "")
    planned, _ = world.run(LINES[name], out, "--dry-run")
    assert planned["status"] == "planned"
    assert not [path for path in world.folder.iterdir() if path.name.lstrip(".").startswith(out + ".")]
    assert not (world.folder / out).exists()
    _, memory = world.run(LINES[name], out)
    folder = world.folder / out
    manifest = json.loads((folder / "manifest.json").read_text())
    tables = [
        path
        for path in folder.rglob("part-*.parquet")
        if path.relative_to(folder).parts[0] != "quarantine" and path.stat().st_nlink == 1  # not another's
    ]
    side = [file.get("rows", 0) for file in manifest["outputs"].get("files", [])]
    happened = {
        "rows_out": manifest["outputs"]["rows"] or sum(side),
        "bytes_out": sum(path.stat().st_size for path in tables),
        "memory_bytes": memory,
    }
    assert planned["shards"] == len(manifest["timing"]["shard_seconds"])
    ratios = {key: planned[key] / value for key, value in happened.items()}
    assert all(0.75 <= ratio <= 1.25 for ratio in ratios.values()), (ratios, happened)
    print({key: round(ratio, 2) for key, ratio in ratios.items()})
