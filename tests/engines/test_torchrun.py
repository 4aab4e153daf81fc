"""The torchrun engine: told to stop, or killed, it leaves no rank behind; what a rank raises is told once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.toy import write_items

ROOT = Path(__file__).parent.parent.parent
# Read by every process at its start: ranks are fresh interpreters that run the real command.
WAITING = """
import os, time
from pathlib import Path
if "TORCHELASTIC_RUN_ID" in os.environ:
    from prerank_tools.encoders.stage import EmbedItems
    process = EmbedItems.process
    def waiting(self, shard, ctx):
        if shard.index:
            Path(os.environ["WAITING_FOLDER"], f"rank{os.getpid()}").touch()
            time.sleep(300)
        return process(self, shard, ctx)
    EmbedItems.process = waiting
"""


def runs(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][:3]
    except OSError:
        return False


def until(found: object, what: str) -> None:
    """Wait for what must come, two minutes at most."""
    deadline = time.monotonic() + 120
    while not found():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_job_stops_its_ranks(tmp_path: Path, number: int, code: int) -> None:
    items = tmp_path / "items"
    for part in range(4):
        write_items(items / f"part-{part}.parquet", 20, first=20 * part)
    (tmp_path / "sitecustomize.py").write_text(WAITING)
    line = ["embed", "items", str(items), "-o", str(tmp_path / "emb"), "--engine", "torchrun"]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    job = subprocess.Popen(
        [sys.executable, "-m", "prerank_cli", *line, "--workers", "2", "--threads", "1"],
        env={**os.environ, "PYTHONPATH": paths, "WAITING_FOLDER": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: len(list(tmp_path.glob("rank*"))) == 2, "two ranks at work")
    job.send_signal(number)
    _, errors = job.communicate(timeout=90)
    assert job.returncode == code
    ranks = [int(path.name.removeprefix("rank")) for path in tmp_path.glob("rank*")]
    until(lambda: not any(map(runs, ranks)), "no rank left")
    assert "Traceback" not in errors, errors
    assert not (tmp_path / "emb").exists()
    assert (tmp_path / ".emb.partial/plan.json").exists()
    if number == signal.SIGTERM:
        assert not (tmp_path / ".emb.error").exists()
        assert errors.splitlines()[-1] == "hint: run the same line again: finished shards stay"


def test_what_a_rank_raises_is_told_once_with_its_code(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet")
    line = ["embed", "items", str(items), "-o", str(tmp_path / "emb"), "--engine", "torchrun"]
    told = subprocess.run(
        [sys.executable, "-m", "prerank_cli", *line, "--template", "{brand}", "--workers", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 3
    lines = [text for text in told.stderr.splitlines() if " INFO " not in text]
    assert [text.split(": ")[0] for text in lines] == ["error", "hint"]
    assert "brand" in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.parquet"]
