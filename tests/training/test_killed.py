"""Every trainer, killed while it writes a checkpoint, goes on from the one before to the same weights."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tests.encoders.tiny_models import bert
from tests.test_bad_input import DAY, frames

ROOT = Path(__file__).parent.parent.parent
KNOBS = """
[train.user]
max_events = 4
[train.user.model]
width = 16
[train.user.training]
epochs = 3
patience = 0
checkpoint_every = 1
[train.scorer.training]
epochs = 3
checkpoint_every = 1
[train.encoder]
tune = "last"
valid_share = 0.2
[train.encoder.training]
epochs = 3
batch_size = 8
checkpoint_every = 2
[train.quantizer]
levels = 2
codes = 4
[train.quantizer.network]
code_dim = 4
hidden = [8]
train = { epochs = 3, batch_size = 16, checkpoint_every = 1 }
"""
LINES = {
    "user": "train user --events events.parquet --embeddings embeddings.parquet",
    "scorer": "train scorer --requests requests.parquet --events events.parquet --items items.parquet "
    "--embeddings embeddings.parquet",
    "encoder": "train encoder --pairs pairs --items items.parquet --model bert",
    "quantizer": "train quantizer embeddings.parquet --quantizer rqvae",
}
# Runs the line of each input line in a forked child, which kills itself when it writes the record of its n-th
# checkpoint: the tensors are there, the record is not. The parent never computes: children start clean.
KILL_AT = """
import os, signal, sys
from prerank_cli.main import call
from prerank_tools.training import checkpoints
import prerank_tools.encoders.pretrain_stage, prerank_tools.quantizers.train_stage
import prerank_tools.scorers.train_stage, prerank_tools.users.train_stage

def count_down(stop):
    write, saved = checkpoints._write_synced, [0]
    def counted(*arguments):
        saved[0] += 1
        if saved[0] == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)
    checkpoints._write_synced = counted
    return saved

for line in sys.stdin:
    stop, words = line.rstrip().split("\\t")
    child = os.fork()
    if child == 0:
        saved = count_down(int(stop))
        code = call(words.split())
        print("ended", code, saved[0], flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        print("killed", os.WTERMSIG(status), 0, flush=True)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of the bad-input tests as they are when they are good, pairs, and a tiny model."""
    folder = tmp_path_factory.mktemp("killed")
    made = frames()
    made["requests"] = made["requests"].with_columns(pl.col("timestamp") - 4 * DAY)
    for name in ("items", "events", "embeddings", "requests"):
        made[name].write_parquet(folder / f"{name}.parquet")
    (folder / "pairs").mkdir()
    ids, titles = made["items"]["item_id"], made["items"]["title"]
    pl.DataFrame({"query_text": titles, "item_id": ids}).write_parquet(folder / "pairs/part-0.parquet")
    bert(folder / "bert")
    (folder / "knobs.toml").write_text(KNOBS)
    return folder


def attempt(world: Path, line: str, runs: list[tuple[int, str]]) -> list[list[str]]:
    """One run an (n-th checkpoint to die at, output): what came of it, and how many checkpoints it wrote."""
    how = "--config knobs.toml --workers 1 --threads 1 --device cpu"
    lines = "".join(f"{stop}\t{line} -o {out} {how}\n" for stop, out in runs)
    told = subprocess.run(
        [sys.executable, "-c", KILL_AT],
        input=lines,
        capture_output=True,
        text=True,
        cwd=world,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    found = [text.split() for text in told.stdout.splitlines() if text.startswith(("ended", "killed"))]
    assert len(found) == len(runs), told.stderr
    return found


# The other two are stopped in their own stages' tests as well.
@pytest.mark.parametrize(
    "name", ["scorer", "quantizer", *(pytest.param(n, marks=pytest.mark.slow) for n in ("user", "encoder"))]
)
def test_a_killed_training_ends_in_the_same_weights(world: Path, name: str) -> None:
    ((word, code, saved),) = attempt(world, LINES[name], [(0, f"{name}_calm")])
    assert (word, code) == ("ended", "0") and int(saved) >= 3
    stops = [2, int(saved)]
    outs = [f"{name}_{stop}" for stop in stops]
    killed = attempt(world, LINES[name], list(zip(stops, outs, strict=True)))
    assert killed == [["killed", str(int(signal.SIGKILL)), "0"]] * len(stops)
    assert not any((world / out).exists() for out in outs)
    again = attempt(world, LINES[name], [(0, out) for out in outs])
    assert [(word, code) for word, code, _ in again] == [("ended", "0")] * len(outs)
    # It went on: fewer checkpoints than a whole training writes.
    assert all(int(more) <= int(saved) - stop + 1 for (_, _, more), stop in zip(again, stops, strict=True))
    weights = sorted(path.name for path in (world / f"{name}_calm").rglob("*.safetensors"))
    assert weights
    for out in outs:
        for path in sorted((world / f"{name}_calm").rglob("*")):
            if path.suffix == ".safetensors" or path.name == "metrics.jsonl":
                other = world / out / path.relative_to(world / f"{name}_calm")
                assert other.read_bytes() == path.read_bytes(), (out, path.name)
