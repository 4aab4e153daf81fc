"""What goes wrong in a night: killed at every commit point, stopped, out of space, watched while it swaps."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import polars as pl
import pytest

from prerank_cli.main import call
from prerank_tools.errors import PrerankError
from prerank_tools.run.inspection import describe
from prerank_tools.run.job import RunOptions, run
from prerank_tools.run.manifest import read_manifest
from prerank_tools.tables.table import open_table
from tests.toy import Copy, Number, tree, write_items

# Runs Number(items) -> out in a forked child for each line of its input, which names out, tag and the commit
# point (flush, rename or swap) at which the child kills itself, 0 for never. The parent never uses polars, so
# the children start clean, and nothing is imported twice.
KILL_AT = """
import os, signal, sys
from pathlib import Path
from prerank_tools.run import commit
from prerank_tools.run.job import RunOptions, run
from tests.toy import Number

def count_down(stop):
    calls = [0]
    def counted(function):
        def call(*arguments):
            calls[0] += 1
            if calls[0] == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)
        return call
    commit.os.replace = counted(os.replace)
    commit.os.rename = counted(os.rename)
    commit.flush = counted(commit.flush)
    commit.exchange = counted(commit.exchange)
    return calls

for line in sys.stdin:
    items, out, tag, stop = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        calls = count_down(int(stop))
        run(Number(Path(items), tag=tag), Path(out), RunOptions(workers=1, overwrite=True))
        print("done", calls[0], flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        print("killed", os.WTERMSIG(status), flush=True)
"""


def attempt(items: Path, outs: list[Path], stops: list[int], tag: str) -> list[tuple[str, int]]:
    """One run an output, each in a process of its own: ("done", commit points) or ("killed", signal)."""
    lines = "".join(f"{items}\t{out}\t{tag}\t{stop}\n" for out, stop in zip(outs, stops, strict=True))
    root = Path(__file__).parent.parent
    told = subprocess.run(
        [sys.executable, "-c", KILL_AT], input=lines, capture_output=True, text=True, cwd=root, check=True
    )
    return [(word, int(number)) for word, number in map(str.split, told.stdout.splitlines())]


@pytest.mark.parametrize("tag", ["", "tonight"], ids=["first night", "overwriting last night's"])
def test_killed_at_every_commit_point_it_resumes_to_the_same_bytes(tmp_path: Path, tag: str) -> None:
    items = write_items(tmp_path / "items.parquet", 5)
    reference = tmp_path / "reference"
    if tag:
        run(Number(items), reference, RunOptions(workers=1))
    last_night = tree(reference, below="data") if tag else {}
    ((_, points),) = attempt(items, [reference], [0], tag)
    assert points > 20
    expected = tree(reference, below="data")
    outs = [tmp_path / f"out{stop}" for stop in range(1, points + 1)]
    if tag:
        attempt(items, outs, [0] * points, "")

    assert attempt(items, outs, list(range(1, points + 1)), tag) == [("killed", signal.SIGKILL)] * points
    for out in outs:
        # A reader finds nothing, last night's or tonight's, never a mixture.
        assert (tree(out, below="data") if out.exists() else {}) in (last_night, expected)

    assert {word for word, _ in attempt(items, outs, [0] * points, tag)} == {"done"}
    for out in outs:
        assert tree(out, below="data") == expected
        assert read_manifest(out).outputs == read_manifest(reference).outputs  # type: ignore[union-attr]
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_sigterm_leaves_with_143_and_keeps_finished_shards(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", 6)
    script = (
        "import sys, time\n"
        "from prerank_cli import main\n"
        "from tests.toy import Copy\n"
        "from pathlib import Path\n"
        "process = Copy.process\n"
        "def slow(self, shard, ctx):\n"
        "    if shard.index == 1:\n"
        "        print('waiting', flush=True); time.sleep(60)\n"
        "    return process(self, shard, ctx)\n"
        "Copy.process = slow\n"
        "from prerank_cli.options import stage_command\n"
        "import typer\n"
        "@stage_command(main.app, 'toy', command='toy', examples=())\n"
        "def toy(items: Path):\n"
        "    return Copy(items)\n"
        "main.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, "toy", str(items), "-o", str(tmp_path / "out"), "--workers", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    assert process.stdout and process.stdout.readline() == "waiting\n"
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert errors.splitlines()[-2:] == [
        "error: terminated",
        "hint: run the same line again: finished shards stay",
    ]
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial/shards/00000.json").exists()
    assert run(Copy(items), tmp_path / "out", RunOptions(workers=1)).status == "done"


def test_a_file_size_limit_ends_in_one_line_and_a_rerun_finishes(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", 3, blob=[os.urandom(30_000) for _ in range(3)])

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    script = (
        "import sys; from pathlib import Path\n"
        "from prerank_tools.run.job import RunOptions, run\n"
        "from prerank_tools.errors import PrerankError\n"
        "from tests.toy import Copy\n"
        "try:\n"
        "    run(Copy(Path(sys.argv[1])), Path(sys.argv[2]), RunOptions(workers=1))\n"
        "except PrerankError as fault:\n"
        "    print(fault.message, file=sys.stderr); sys.exit(fault.exit_code)\n"
    )
    command = [sys.executable, "-c", script, str(items), str(tmp_path / "out")]
    root = Path(__file__).parent.parent
    failed = subprocess.run(command, capture_output=True, text=True, cwd=root, preexec_fn=limit)
    assert failed.returncode == 75, failed.stderr
    assert "no space left" in failed.stderr and "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()
    assert subprocess.run(command, cwd=root).returncode == 0
    assert open_table(tmp_path / "out", "items").rows == 3


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self/ns").exists(), reason="root writes anywhere")
def test_an_output_below_a_file_is_one_line(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet")
    with pytest.raises(PrerankError, match="cannot write there"):
        run(Copy(items), items / "out", RunOptions(workers=1))


def test_a_reader_always_finds_a_whole_output_while_it_is_replaced(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", 30)
    out = tmp_path / "out"
    run(Copy(items, tag="0"), out, RunOptions(workers=1))
    stop, missing = threading.Event(), []
    tags: set[str] = set()

    def poll() -> None:
        while not stop.is_set():
            if not (out / "manifest.json").exists():
                missing.append(time.time())
            else:
                tags.add(read_manifest(out).params["tag"])  # type: ignore[union-attr]

    reader = threading.Thread(target=poll)
    reader.start()
    for night in range(1, 8):
        run(Copy(items, tag=str(night)), out, RunOptions(workers=1, overwrite=True))
    stop.set()
    reader.join()
    assert missing == []
    assert len(tags) > 2


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_verify_finds_a_damaged_part_by_its_checksum(tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    run(Copy(write_items(tmp_path / "items.parquet")), out, RunOptions(workers=1))
    assert describe(out, verify=True)["verified_files"] == 4
    part = out / "data/part-00002.parquet"
    content = bytearray(part.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    elif damage == "cut":
        part.write_bytes(content[:-20])
    else:
        part.unlink()
    with pytest.raises(PrerankError, match="part-00002"):
        describe(out, verify=True)


def test_verify_finds_a_flipped_byte_anywhere_in_a_single_file(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    run(Copy(write_items(tmp_path / "items.parquet", 50)), out, RunOptions(workers=1))
    assert describe(out, verify=True)["verified_files"] == 1
    whole = out.read_bytes()
    for place in [*range(0, len(whole), 61), *range(len(whole) - 9, len(whole))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1
        out.write_bytes(flipped)
        with pytest.raises(PrerankError, match=r"out\.parquet") as fault:
            describe(out, verify=True)
        assert fault.value.exit_code in (2, 3), place
    out.write_bytes(whole)
    assert describe(out, verify=True)["verified_files"] == 1


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_inspect_says_it_in_one_line(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "emb"
    items = write_items(tmp_path / "items.parquet")
    assert call(["embed", "items", str(items), "-o", str(out), "--workers", "1"]) == 0
    part = out / "data/part-00000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content if damage == "flip" else content[:-20])
    capsys.readouterr()
    assert call(["inspect", str(out)]) == 0
    assert call(["inspect", str(out), "--verify"]) == 3
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: {part}: its bytes are not those that were written"
    assert hint == "hint: write the output again with --overwrite"


@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_a_damaged_manifest_is_one_line_and_can_be_replaced(tmp_path: Path, name: str) -> None:
    items, out = write_items(tmp_path / "items.parquet"), tmp_path / name
    run(Copy(items), out, RunOptions(workers=1))
    file = out / "manifest.json" if out.is_dir() else out
    content = bytearray(file.read_bytes())
    place = content.rindex(b'"fingerprint"')
    content[place] ^= 1
    file.write_bytes(content)
    for attempt in (
        lambda: describe(out),
        lambda: open_table(out, "items"),
        lambda: run(Copy(items), out, RunOptions(workers=1)),
    ):
        with pytest.raises(PrerankError, match="damaged") as fault:
            attempt()
        assert fault.value.exit_code == 3
    assert run(Copy(items), out, RunOptions(workers=1, overwrite=True)).status == "done"
    assert describe(out, verify=True)["verified_files"]


def test_a_part_cut_short_is_refused_by_the_next_stage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(Copy(write_items(tmp_path / "items.parquet")), out, RunOptions(workers=1))
    part = out / "data/part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(PrerankError, match=r"part-00001.parquet: missing or not the \d+ bytes"):
        open_table(out, "items")


def test_a_lock_of_a_dead_process_is_no_lock(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet")
    (tmp_path / ".out.lock").write_text("999999")
    assert run(Copy(items), tmp_path / "out", RunOptions(workers=1)).status == "done"


def test_counts_equal_the_input_less_its_quarantine(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", 100)
    frame = (
        pl.read_parquet(items)
        .with_row_index()
        .with_columns(
            pl.when(pl.col("index") % 9 == 0).then(None).otherwise(pl.col("item_id")).alias("item_id")
        )
    )
    frame.drop("index").write_parquet(items)
    manifest = run(Copy(items), tmp_path / "out", RunOptions(workers=1, max_bad=0.2)).manifest
    assert manifest
    assert manifest.outputs["rows"] == manifest.counts["rows_in"] - manifest.counts["quarantined"] == 88
