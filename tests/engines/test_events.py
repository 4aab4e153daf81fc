"""What workers have to say reaches the one who typed the line: one UTC line each, with worker and shard."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from prerank_tools.errors import ContractError
from prerank_tools.run import job
from prerank_tools.run.job import RunOptions, run
from tests.toy import Copy, Talking, tree, write_items

ROOT = Path(__file__).parent.parent.parent
LINE = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO embed\.items quarantine (?P<fields>.*)$")


class Heard:
    """A log that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]


def test_two_workers_are_heard_and_their_records_hold_no_event(tmp_path: Path) -> None:
    items, heard = write_items(tmp_path / "items.parquet", 30), Heard()
    run(Talking(items), tmp_path / "out", RunOptions(workers=2, log=heard))
    told = heard.of("out_of_memory")
    assert sorted(fields["shard"] for fields in told) == list(range(10))
    assert {fields["worker"] for fields in told} <= {0, 1}
    assert all((fields["rows"], fields["next"]) == (3, 2) for fields in told)
    assert all(abs(fields["at"] - datetime.now(UTC)) < timedelta(minutes=5) for fields in told)
    run(Copy(items), tmp_path / "quiet", RunOptions(workers=1))
    assert tree(tmp_path / "out", below="data") == tree(tmp_path / "quiet", below="data")
    assert not any(b"out_of_memory" in text for text in tree(tmp_path / "out", below="shards").values())


def test_a_worker_that_fails_is_heard_before_its_error(tmp_path: Path) -> None:
    items, heard = write_items(tmp_path / "items.parquet", 6), Heard()
    with pytest.raises(ContractError, match="shard failed"):
        run(Talking(items, fails=1), tmp_path / "out", RunOptions(workers=2, log=heard))
    assert 1 in [fields["shard"] for fields in heard.of("out_of_memory")]


def test_one_process_says_at_once_what_it_sets_aside(tmp_path: Path) -> None:
    items, heard = with_nulls(tmp_path), Heard()
    run(Copy(items, rows=10), tmp_path / "out", RunOptions(workers=1, max_bad=1, log=heard))
    assert heard.of("quarantine") == [
        {"shard": shard, "rows": 2, "reason": "item_id is null"} for shard in range(4)
    ]


def test_a_run_that_goes_on_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items, heard = write_items(tmp_path / "items.parquet", 9), Heard()
    with monkeypatch.context() as patch:
        patch.setattr(job, "reduce_stage", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(Copy(items), tmp_path / "out", RunOptions(workers=2))
    run(Copy(items), tmp_path / "out", RunOptions(workers=2, log=heard))
    assert heard.of("resume") == [{"path": str(tmp_path / ".out.partial")}]


def with_nulls(folder: Path) -> Path:
    """Four parts of ten items, two of each without an id."""
    items = folder / "items"
    for part in range(4):
        path = write_items(items / f"part-{part}.parquet", 10, first=10 * part)
        frame = pl.read_parquet(path).with_row_index("n")
        frame = frame.with_columns(item_id=pl.when(pl.col("n") < 2).then(None).otherwise("item_id"))
        frame.drop("n").write_parquet(path)
    return items


@pytest.mark.parametrize("engine", ["local", "torchrun", pytest.param("ray", marks=pytest.mark.ray)])
def test_every_engine_brings_the_lines_to_stderr(tmp_path: Path, engine: str) -> None:
    line = ["embed", "items", str(with_nulls(tmp_path)), "-o", str(tmp_path / "emb"), "--max-bad", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "prerank_cli", *line, "--engine", engine, "--workers", "2", "--threads", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [match["fields"] for text in done.stderr.splitlines() if (match := LINE.match(text))]
    assert sorted(re.sub(r"worker=\d+", "worker=N", fields) for fields in found) == [
        f'shard={shard} rows=2 reason="item_id is null" worker=N' for shard in range(4)
    ]
