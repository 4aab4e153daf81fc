"""Engines agree: one process, two, two ranks of torchrun and two Ray actors publish the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from prerank_cli.main import call
from prerank_sample_data import sample
from tests.encoders.tiny_models import bert

ROOT = Path(__file__).parent.parent
HELD_OUT = 1_318_291_200  # 2011-10-11
QUICK = """
[train.user]
max_events = 8
[train.user.model]
width = 16
[train.user.training]
epochs = 1
[train.scorer.training]
epochs = 1
"""
# What the parity is of; each line reads what PREPARED makes, in one process.
PREPARED = """
data partition events -o log --buckets 4
data requests log --items items --from 2011-09-01 --until 2011-10-11 -o learn
data requests log --items items --from 2011-10-11 -o asked
embed items items -o emb
quantize sid emb -o sid
train user --events log --embeddings emb --until 2011-09-01 --config quick.toml -o user_model
embed users --events log --embeddings emb --model user_model --as-of 2011-09-01 --as-of 2011-10-11 -o uemb
train scorer --requests learn --events log --items items --embeddings emb --users uemb --config quick.toml
 -o scorer
"""
LINES = {
    "partition": "data partition events --buckets 4",
    "tfidf": "embed items items",
    "bert": "embed items items --model bert",
    "sid, fitted": "quantize sid emb",
    "sid": "quantize sid emb --codebook sid/codebook",
    "gsu": "gsu topk --requests asked --events log --embeddings emb",
    "users": "embed users --events log --embeddings emb --model user_model --as-of 2011-09-01 "
    "--as-of 2011-10-11",
    "vectors": "export vectors emb --format int8",
    "features": "data features --events log --requests asked",
    "score": "score --requests asked --model scorer --items items --embeddings emb --users uemb --events log",
}
IN_TORCHRUN = ("sid, fitted", "gsu", "score")  # a reduce, a plain map, a model; the others are slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The retail sample cut to 40 users, in several parts, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("engines")
    events = pl.read_parquet(sample("retail_events"))
    events = events.filter(pl.col("user_id").is_in(events["user_id"].unique().sort()[:40].implode()))
    items = pl.read_parquet(sample("retail_items")).join(
        events.select("item_id").unique(), on="item_id", how="semi"
    )
    for name, frame in (("events", events.sort("timestamp")), ("items", items.sort("item_id"))):
        (folder / name).mkdir()
        size = -(-len(frame) // 4)
        for part in range(4):
            frame[part * size : (part + 1) * size].write_parquet(folder / name / f"part-{part}.parquet")
    bert(folder / "bert")
    (folder / "quick.toml").write_text(QUICK)
    at = Path.cwd()
    os.chdir(folder)
    try:
        for line in PREPARED.strip().replace("\n ", " ").splitlines():
            assert call([*line.split(), "--threads", "1", "--workers", "1"]) == 0, line
    finally:
        os.chdir(at)
    return folder


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The world as the current folder, as for one who types the lines."""
    monkeypatch.chdir(world)
    return world


def made(line: str, engine: str, workers: int) -> dict[str, bytes]:
    """Every published byte of a line under an engine, made once; the manifest tells the run, not the work."""
    out = Path(f"out {line} {engine} {workers}".replace(" ", "_").replace(",", ""))
    if not out.exists():
        how = ["--engine", engine, "--workers", str(workers), "--threads", "1", "-o", str(out)]
        assert call([*LINES[line].split(), *how]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["invocation"]["engine"] == engine and manifest["invocation"]["workers"] == workers
    assert len(manifest["timing"]["shard_seconds"]) > 1, "one shard proves nothing"
    told = {
        "digest": manifest["content_digest"].encode(),
        "counts": json.dumps(manifest["counts"], sort_keys=True).encode(),
        "quality": json.dumps(manifest["quality"], sort_keys=True).encode(),
    }
    files = {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "manifest.json" and path.parent.name != "shards"
    }
    assert any(name.endswith(".parquet") for name in files)
    return told | files


def check(line: str, engine: str, workers: int) -> None:
    """Fails naming the files that differ from those of one process."""
    one, other = made(line, "local", 1), made(line, engine, workers)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.parametrize("line", LINES)
def test_two_processes_publish_the_bytes_of_one(line: str, here: Path) -> None:
    check(line, "local", 2)


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=() if line in IN_TORCHRUN else pytest.mark.slow) for line in LINES]
)
def test_two_ranks_publish_the_bytes_of_one_process(line: str, here: Path) -> None:
    check(line, "torchrun", 2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A private cluster of two CPUs."""
    ray = pytest.importorskip("ray")
    paths = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), paths])
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    os.environ["PYTHONPATH"] = paths


@pytest.mark.ray
@pytest.mark.parametrize("line", LINES)
def test_two_actors_publish_the_bytes_of_one_process(line: str, here: Path, cluster: None) -> None:
    check(line, "ray", 2)
