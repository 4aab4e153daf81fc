"""A run: done, up to date, resumed, refused, published whole."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from prerank_tools.errors import ConflictError, ContractError, GateError, RetryError, UsageError
from prerank_tools.run import commit, job, worker
from prerank_tools.run.job import RunOptions, run
from prerank_tools.run.lock import Lock
from prerank_tools.stage import Context
from prerank_tools.tables.table import open_table
from tests.toy import Copy, Number, tree, write_items

ONE = RunOptions(workers=1)


def test_a_run_writes_one_part_a_shard_and_a_manifest_that_counts_them(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", 10)
    result = run(Copy(items), tmp_path / "out", ONE)
    assert result.status == "done"
    assert sorted(tree(tmp_path / "out")) == [
        "data/_SUCCESS",
        *[f"data/part-0000{n}.parquet" for n in range(4)],
        "manifest.json",
        *[f"shards/0000{n}.json" for n in range(4)],
    ]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["outputs"]["rows"] == 10
    assert manifest["counts"] == {"rows_in": 10, "quarantined": 0}
    assert [part["rows"] for part in manifest["outputs"]["parts"]] == [3, 3, 3, 1]
    assert list(tmp_path.glob(".*")) == []


def test_the_same_work_again_is_up_to_date_and_touches_nothing(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet")
    run(Copy(items), tmp_path / "out", ONE)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(Copy(items), tmp_path / "out", ONE).status == "up to date"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_moved_input_with_the_same_bytes_is_the_same_work(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet")
    run(Copy(items), tmp_path / "out", ONE)
    moved = items.rename(tmp_path / "moved.parquet")
    assert run(Copy(moved), tmp_path / "out", ONE).status == "up to date"


def test_other_work_is_refused_without_overwrite_and_replaces_with_it(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet")
    run(Copy(items), tmp_path / "out", ONE)
    before = tree(tmp_path / "out")
    with pytest.raises(ConflictError, match="other inputs or parameters"):
        run(Copy(items, tag="new"), tmp_path / "out", ONE)
    assert tree(tmp_path / "out") == before
    run(Copy(items, tag="new"), tmp_path / "out", RunOptions(workers=1, overwrite=True))
    assert open_table(tmp_path / "out", "items").read()["tag"].unique().to_list() == ["new"]
    assert list(tmp_path.glob(".*")) == []


def test_a_folder_of_the_user_is_never_taken_for_an_output(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(ConflictError, match="not written by prerank"):
        run(Copy(items), tmp_path / "out", ONE)
    assert tree(tmp_path / "out") == {"mine.txt": b"mine"}


def test_a_failed_run_resumes_with_the_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = write_items(tmp_path / "items.parquet")
    whole = run(Copy(items), tmp_path / "whole", ONE)
    seen: list[int] = []
    process = Copy.process

    def fail_at_two(self: Copy, shard, ctx):  # type: ignore[no-untyped-def]
        seen.append(shard.index)
        if shard.index == 2 and seen.count(2) == 1:
            raise OSError(28, "No space left on device", "somewhere")
        return process(self, shard, ctx)

    monkeypatch.setattr(Copy, "process", fail_at_two)
    with pytest.raises(RetryError, match="no space left"):
        run(Copy(items), tmp_path / "out", ONE)
    assert not (tmp_path / "out").exists()
    result = run(Copy(items), tmp_path / "out", ONE)
    assert seen == [0, 1, 2, 2, 3]
    assert result.manifest and whole.manifest
    assert result.manifest.content_digest == whole.manifest.content_digest
    assert tree(tmp_path / "out", below="data") == tree(tmp_path / "whole", below="data")


def test_a_damaged_part_of_an_unfinished_run_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = write_items(tmp_path / "items.parquet")
    run(Copy(items), tmp_path / "whole", ONE)
    monkeypatch.setattr(job, "publish_output", lambda *arguments: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(RetryError):
        run(Copy(items), tmp_path / "out", ONE)
    monkeypatch.undo()
    part = tmp_path / ".out.partial/data/part-00001.parquet"
    bytes_ = bytearray(part.read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    part.write_bytes(bytes_)
    run(Copy(items), tmp_path / "out", ONE)
    assert tree(tmp_path / "out", below="data") == tree(tmp_path / "whole", below="data")


def test_two_workers_write_the_bytes_of_one(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", 40)
    run(Number(items), tmp_path / "one", ONE)
    run(Number(items), tmp_path / "two", RunOptions(workers=2))
    assert tree(tmp_path / "one", below="data") == tree(tmp_path / "two", below="data")
    table = open_table(tmp_path / "two", "items").read()
    assert table["number"].to_list() == list(range(40))


def test_a_single_file_holds_rows_and_manifest_and_is_up_to_date_again(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", 10)
    assert run(Copy(items), tmp_path / "out.parquet", ONE).status == "done"
    assert run(Copy(items), tmp_path / "out.parquet", ONE).status == "up to date"
    table = open_table(tmp_path / "out.parquet", "items")
    assert table.rows == 10
    assert table.manifest and table.manifest["stage"] == "toy.copy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.parquet", "out.parquet"]


def test_a_stage_that_stores_an_artefact_refuses_a_single_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="more than one table"):
        run(Number(write_items(tmp_path / "items.parquet")), tmp_path / "out.parquet", ONE)


def test_a_second_job_on_the_same_output_is_told_to_come_again(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet")
    with Lock(tmp_path / "out"), pytest.raises(RetryError, match="another job"):
        run(Copy(items), tmp_path / "out", ONE)
    assert run(Copy(items), tmp_path / "out", ONE).status == "done"


def test_bad_rows_are_set_aside_and_too_many_stop_the_job(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", 10)
    frame = pl.read_parquet(items).with_columns(
        pl.when(pl.col("item_id") == "i004").then(None).otherwise(pl.col("item_id")).alias("item_id")
    )
    frame.write_parquet(items)
    with pytest.raises(ContractError, match="1 of 10 rows"):
        run(Copy(items), tmp_path / "out", ONE)
    assert not (tmp_path / "out").exists()
    result = run(Copy(items), tmp_path / "out", RunOptions(workers=1, max_bad=0.1))
    assert result.manifest and result.manifest.counts == {"rows_in": 10, "quarantined": 1}
    bad = pl.read_parquet(tmp_path / "out/quarantine/part-00001.parquet")
    assert bad.to_dicts() == [{"item_id": None, "reason": "item_id is null"}]


def test_an_input_replaced_on_the_way_stops_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = write_items(tmp_path / "items.parquet")
    process = Copy.process

    def replace_then_process(self: Copy, shard, ctx):  # type: ignore[no-untyped-def]
        if shard.index == 1:
            write_items(items, 12)
        return process(self, shard, ctx)

    monkeypatch.setattr(Copy, "process", replace_then_process)
    with pytest.raises(RetryError, match="was replaced"):
        run(Copy(items), tmp_path / "out", ONE)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert run(Copy(items), tmp_path / "out", ONE).manifest.outputs["rows"] == 12  # type: ignore[union-attr]


def test_a_table_that_lost_half_its_rows_does_not_replace_last_nights(tmp_path: Path) -> None:
    run(Copy(write_items(tmp_path / "a.parquet", 10)), tmp_path / "monday", ONE)
    less = Copy(write_items(tmp_path / "b.parquet", 5))
    compared = RunOptions(workers=1, compare_to=tmp_path / "monday")
    with pytest.raises(GateError, match=r"rows moved by 0\.5"):
        run(less, tmp_path / "tuesday", compared)
    assert not (tmp_path / "tuesday").exists()
    warned = RunOptions(workers=1, compare_to=tmp_path / "monday", gate="warn")
    manifest = run(less, tmp_path / "tuesday", warned).manifest
    assert manifest and [gate["passed"] for gate in manifest.gates] == [False]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", 10)
    result = run(Copy(items), tmp_path / "out", RunOptions(dry_run=True))
    assert result.status == "planned"
    assert (result.plan["shards"], result.plan["rows_in"], result.plan["shards_done"]) == (4, 10, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["items.parquet"]


def test_a_part_is_committed_only_after_its_bytes(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", 3)
    run(Copy(items), tmp_path / "out", ONE)
    record = json.loads((tmp_path / "out/shards/00000.json").read_text())
    part = tmp_path / "out" / record["files"][0]["path"]
    assert record["files"][0]["bytes"] == part.stat().st_size
    assert worker.summed([record, record]) == {"rows_in": 6, "quarantined": 0}


class Prepared(Copy):
    """Leaves a file for its shards, as a stage does that buckets its input."""

    def prepare(self, ctx: Context) -> None:
        (ctx.scratch / "runs").mkdir()
        (ctx.scratch / "runs" / "one").write_bytes(b"rows")


def test_what_prepare_leaves_for_the_shards_is_on_disk_before_the_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = write_items(tmp_path / "items.parquet")
    flush, flushed = commit.flush, []

    def recorded(path: Path) -> None:
        flushed.append(path.name)
        flush(path)

    monkeypatch.setattr(commit, "flush", recorded)
    run(Prepared(items), tmp_path / "out", ONE)
    assert flushed.index("one") < flushed.index(".prepare.json.tmp")
