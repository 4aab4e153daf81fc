"""The local engine: a worker that dies leaves the finished shards; a dead parent takes its workers along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prerank_tools.errors import ContractError, RetryError
from prerank_tools.run.job import RunOptions, run
from tests.toy import Copy, Dying, tree, write_items

ROOT = Path(__file__).parent.parent.parent


def test_a_killed_worker_is_said_and_the_next_run_finishes(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", 20)
    run(Copy(items), tmp_path / "whole", RunOptions(workers=1))
    stage = Dying(items, marker=tmp_path / "marker")
    with pytest.raises(RetryError, match="a worker process died"):
        run(stage, tmp_path / "out", RunOptions(workers=2))
    assert not (tmp_path / "out").exists()
    assert run(stage, tmp_path / "out", RunOptions(workers=2)).status == "done"
    assert tree(tmp_path / "out", below="data") == tree(tmp_path / "whole", below="data")


def test_an_error_in_a_worker_keeps_its_code_and_hint(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", 20)
    stage = Copy(items)
    import polars as pl

    frame = pl.read_parquet(items)
    frame.with_columns(item_id=pl.lit(None, dtype=pl.String)).write_parquet(items)
    with pytest.raises(ContractError, match="20 of 20 rows are unusable") as fault:
        run(stage, tmp_path / "out", RunOptions(workers=2))
    assert fault.value.exit_code == 3 and "--max-bad" in fault.value.hint


def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", 20)
    script = (
        "import os, sys, time; from pathlib import Path\n"
        "from prerank_tools.run.job import RunOptions, run\n"
        "from tests.test_slow import Slow\n"
        "if __name__ == '__main__':\n"
        f"    run(Slow(Path({str(items)!r})), Path({str(tmp_path / 'out')!r}), RunOptions(workers=2))\n"
    )
    module = tmp_path / "tests"
    module.mkdir()
    (module / "test_slow.py").write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "from dataclasses import dataclass\n"
        "from tests.toy import Copy\n"
        "@dataclass(frozen=True)\n"
        "class Slow(Copy):\n"
        "    def process(self, shard, ctx):\n"
        f"        (Path({str(tmp_path)!r}) / f'pid{{os.getpid()}}').touch()\n"
        "        time.sleep(60)\n"
    )
    (module / "toy.py").write_text((ROOT / "tests/toy.py").read_text())
    (tmp_path / "main.py").write_text(script)
    parent = subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path)
    deadline = time.time() + 60
    while len(list(tmp_path.glob("pid*"))) < 2 and time.time() < deadline:
        time.sleep(0.05)
    pids = [int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*")]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    while any(_runs(pid) for pid in pids) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIG_DFL)
    except ProcessLookupError:
        return False
    # A zombie waits for a parent that will reap it; it runs no more.
    return " Z " not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][:3]
