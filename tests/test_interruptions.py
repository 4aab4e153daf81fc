"""A job that is told to stop, whose clock jumps, or whose memory runs out goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from prerank_cli.main import call
from prerank_tools.encoders.text import TextTower
from prerank_tools.errors import ConflictError
from prerank_tools.run import job
from prerank_tools.run.job import RunOptions, run
from tests.encoders.tiny_models import bert
from tests.toy import Copy, Number, tree, write_items

ROOT = Path(__file__).parent.parent
# A command of its own, so that the stage of the test runs as `prerank` runs any other.
STOPPABLE = """
import sys
from pathlib import Path
import typer
from prerank_cli import main
from prerank_cli.options import stage_command
from tests.toy import Waiting
@stage_command(main.app, 'toy', command='toy', examples=())
def toy(items: Path, folder: Path):
    return Waiting(items, folder=folder)
if __name__ == '__main__':
    main.main(sys.argv[1:])
"""


def runs(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][:3]
    except OSError:
        return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_two_workers_stop_at_once_and_their_finished_shards_stay(
    tmp_path: Path, number: int, code: int
) -> None:
    items = write_items(tmp_path / "items.parquet", 12)
    (tmp_path / "stoppable.py").write_text(STOPPABLE)
    line = ["toy", str(items), str(tmp_path), "-o", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "stoppable.py"), *line],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    done = tmp_path / ".out.partial/shards/00000.json"
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("waiting*"))) < 2 or not done.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    started = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - started < 60
    assert errors.splitlines()[-1] == "hint: run the same line again: finished shards stay"
    assert "Traceback" not in errors
    workers = [int(path.name.removeprefix("waiting")) for path in tmp_path.glob("waiting*")]
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))
    assert done.exists() and not (tmp_path / "out").exists()


class Backwards(datetime):
    """A clock that loses a day every time it is read."""

    reads = 0

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:
        cls.reads += 1
        return datetime(2030, 1, 1, tzinfo=UTC) - timedelta(days=cls.reads)


def test_a_clock_that_jumps_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = write_items(tmp_path / "items.parquet", 9)
    run(Number(items), tmp_path / "reference", RunOptions(workers=1))
    reads = iter(range(10**9, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(reads)))
    monkeypatch.setattr(job, "datetime", Backwards)
    # Written tomorrow, as a file from before the jump looks afterwards.
    ahead = time.time_ns() + 86_400 * 10**9
    os.utime(items, ns=(ahead, ahead))
    result = run(Number(items), tmp_path / "out", RunOptions(workers=1))
    assert result.manifest is not None and result.manifest.timing["seconds"] >= 0
    assert Backwards.reads
    assert tree(tmp_path / "out", below="data") == tree(tmp_path / "reference", below="data")
    assert run(Number(items), tmp_path / "out", RunOptions(workers=1)).status == "up to date"

    # New rows with an older time are still new rows.
    write_items(items, 10)
    behind = ahead - 10 * 86_400 * 10**9
    os.utime(items, ns=(behind, behind))
    with pytest.raises(ConflictError):
        run(Number(items), tmp_path / "out", RunOptions(workers=1))
    manifest = run(Number(items), tmp_path / "out", RunOptions(workers=1, overwrite=True)).manifest
    assert manifest is not None and manifest.outputs["rows"] == 10


def test_a_job_that_was_stopped_resumes_after_the_clock_jumped_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = write_items(tmp_path / "items.parquet", 9)
    run(Copy(items), tmp_path / "reference", RunOptions(workers=1))
    process = Copy.process
    monkeypatch.setattr(
        Copy, "process", lambda s, shard, ctx: process(s, shard, ctx) if shard.index < 2 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run(Copy(items), tmp_path / "out", RunOptions(workers=1))
    seen: list[int] = []
    monkeypatch.setattr(
        Copy, "process", lambda s, shard, ctx: (seen.append(shard.index), process(s, shard, ctx))[1]
    )
    monkeypatch.setattr(job, "datetime", Backwards)
    for path in (tmp_path / ".out.partial").rglob("*"):
        os.utime(path, (4e9, 4e9))
    run(Copy(items), tmp_path / "out", RunOptions(workers=1))
    assert seen == [2]
    assert tree(tmp_path / "out", below="data") == tree(tmp_path / "reference", below="data")


def test_a_batch_that_does_not_fit_is_halved_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items = write_items(tmp_path / "items.parquet", 30)
    line = ["embed", "items", str(items), "--model", str(bert(tmp_path / "bert")), "--workers", "1"]
    assert call([*line, "-o", str(tmp_path / "whole.parquet")]) == 0
    forward, largest, tried = TextTower.forward, 8, []

    def tight(tower: TextTower, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        tried.append(len(ids))
        if len(ids) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(tower, ids, mask)

    monkeypatch.setattr(TextTower, "forward", tight)
    capsys.readouterr()
    assert call([*line, "-o", str(tmp_path / "halved.parquet")]) == 0
    told = [text for text in capsys.readouterr().err.splitlines() if "out_of_memory" in text]
    assert [text.split("out_of_memory ")[1] for text in told] == ["rows=30 next=15", "rows=15 next=8"]
    assert tried[:3] == [30, 15, 8] and max(tried[2:]) == 8
    whole, halved = (
        pl.read_parquet(tmp_path / f"{name}.parquet").sort("item_id") for name in ("whole", "halved")
    )
    assert whole["item_id"].equals(halved["item_id"])
    np.testing.assert_allclose(
        halved["embedding"].to_numpy(),
        whole["embedding"].to_numpy(),
        atol=2e-2,  # bf16 where the processor has it
        rtol=0,
    )

    largest = 0
    assert call([*line, "-o", str(tmp_path / "none.parquet")]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-2].startswith("error: out of memory on cpu: not even one row")
    assert told[-1].startswith("hint: ")
    assert not (tmp_path / "none.parquet").exists()
