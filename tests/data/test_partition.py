"""`data partition`: buckets, a day appended without touching the rest, late rows found."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank_sample_data import sample
from prerank_tools.data.pair_stage import Pairs
from prerank_tools.data.request_stage import Requests
from prerank_tools.data.stage import Partition, Split
from prerank_tools.errors import ConflictError, ContractError
from prerank_tools.run.job import Result, RunOptions, run
from prerank_tools.tables import partition as sorter
from prerank_tools.tables.bucketing import bucket_of
from prerank_tools.tables.events import open_events
from prerank_tools.tables.table import open_table

ONE = RunOptions(workers=1)
DAY = 86_400


def write(path: Path, rows: list[tuple[object, object, int, float]], **more: list[object]) -> Path:
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "value"], orient="row")
    frame.with_columns(pl.Series(name, values) for name, values in more.items()).write_parquet(path)
    return path


def make(stage: Partition, out: Path, options: RunOptions = ONE) -> Result:
    return run(stage, out, options)


def read_all(out: Path) -> pl.DataFrame:
    """What a reader sees, bucket after bucket."""
    log = open_events(open_table(out, "events"))
    assert log.source.partitioned
    return pl.concat([log.read(bucket) for bucket in range(log.buckets)])


def test_every_user_lies_in_one_bucket_sorted(tmp_path: Path) -> None:
    rows = [(user, f"i{n}", 1000 - n, float(n)) for n, user in enumerate([5, 3, 9, 3, 5, 7, 3])]
    make(Partition(write(tmp_path / "log.parquet", rows), buckets=4), tmp_path / "out")
    parts = sorted((tmp_path / "out" / "data").glob("part-*.parquet"))
    assert len(parts) == 4
    for bucket, part in enumerate(parts):
        frame = pl.read_parquet(part)
        assert set(bucket_of(frame["user_id"], 4)) <= {bucket}
        assert frame.equals(frame.sort("user_id", "timestamp"))
    assert read_all(tmp_path / "out").height == 7


def test_datetimes_become_epoch_seconds_and_strings_stay(tmp_path: Path) -> None:
    pl.DataFrame(
        {
            "user_id": ["用户甲", "u2"],
            "item_id": ["商品1", "商品2"],
            "timestamp": [datetime(2024, 1, 2, tzinfo=UTC), datetime(2024, 1, 1, tzinfo=UTC)],
        }
    ).write_parquet(tmp_path / "log.parquet")
    result = make(Partition(tmp_path / "log.parquet", buckets=1), tmp_path / "out")
    frame = read_all(tmp_path / "out")
    assert frame.schema["timestamp"] == pl.Int64
    assert frame.filter(pl.col("user_id") == "用户甲")["timestamp"].item() == 1_704_153_600
    assert result.manifest is not None
    assert result.manifest.data_cutoff == 1_704_153_600


def test_many_small_runs_give_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write(tmp_path / "log.parquet", [(n % 17, n % 5, n * 37 % 101, 1.0 * n) for n in range(300)])
    whole = make(Partition(log, buckets=3), tmp_path / "whole")
    monkeypatch.setattr(sorter.scatter, "__kwdefaults__", {"run_rows": 7})
    runs = make(Partition(log, buckets=3), tmp_path / "runs")
    assert whole.manifest is not None
    assert runs.manifest is not None
    assert runs.manifest.content_digest == whole.manifest.content_digest


def test_a_bad_row_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", [(1, 1, 1, 1.0), (None, 2, 2, 1.0), (3, 3, None, 1.0)])  # type: ignore[list-item]
    with pytest.raises(ContractError, match="2 of 3 rows"):
        make(Partition(log, buckets=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = make(Partition(log, buckets=2), tmp_path / "out", replace(ONE, max_bad=1.0))
    assert result.manifest is not None
    assert result.manifest.counts["rows_in"] == 3
    assert result.manifest.counts["quarantined"] == 2
    assert result.manifest.outputs["rows"] == 1
    reasons = pl.read_parquet(tmp_path / "out" / "quarantine" / "part-00000.parquet")["reason"]
    assert sorted(reasons) == ["timestamp is null", "user_id is null"]


def test_an_appended_day_leaves_the_earlier_bytes_alone(tmp_path: Path) -> None:
    first = write(tmp_path / "1.parquet", [(1, 1, 10, 1.0), (2, 1, 20, 1.0)])
    second = write(tmp_path / "2.parquet", [(2, 2, 30, 1.0), (3, 1, 40, 1.0)])
    make(Partition(first, buckets=2), tmp_path / "day1")
    before = {part.name: part.stat() for part in (tmp_path / "day1" / "data").glob("part-*")}
    result = make(Partition(second, append_to=tmp_path / "day1"), tmp_path / "day2")
    for name, status in before.items():
        now = (tmp_path / "day2" / "data" / name).stat()
        assert (now.st_ino, now.st_mtime_ns, now.st_size) == (
            status.st_ino,
            status.st_mtime_ns,
            status.st_size,
        )
    assert result.manifest is not None
    assert result.manifest.counts["rows_in"] == 4
    assert result.manifest.data_cutoff == 40
    assert read_all(tmp_path / "day2").height == 4
    assert read_all(tmp_path / "day1").height == 2


def test_a_day_can_be_appended_in_place(tmp_path: Path) -> None:
    first = write(tmp_path / "1.parquet", [(1, 1, 10, 1.0)])
    second = write(tmp_path / "2.parquet", [(2, 2, 30, 1.0)])
    out = tmp_path / "out"
    make(Partition(first, buckets=2), out)
    stage = Partition(second, append_to=out)
    with pytest.raises(ConflictError):
        make(stage, out)
    make(stage, out, replace(ONE, overwrite=True))
    assert read_all(out)["user_id"].sort().to_list() == [1, 2]
    with pytest.raises(ContractError, match="already"):
        make(stage, out, replace(ONE, overwrite=True))
    assert read_all(out)["user_id"].sort().to_list() == [1, 2]


def test_late_rows_land_in_their_bucket_and_mark_their_users(tmp_path: Path) -> None:
    first = write(tmp_path / "1.parquet", [(1, 1, 10, 1.0), (2, 1, 20, 1.0)], ingested_at=[11, 21])
    rows = [(1, 2, 5, 1.0), (1, 3, 20, 1.0), (3, 4, 15, 1.0), (2, 5, 21, 1.0)]
    second = write(tmp_path / "2.parquet", rows, ingested_at=[30, 31, 32, 33])
    make(Partition(first, buckets=2), tmp_path / "day1")
    result = make(Partition(second, append_to=tmp_path / "day1"), tmp_path / "day2")
    late = pl.read_parquet(tmp_path / "day2" / "late_users" / "data" / "part-*.parquet").sort("user_id")
    assert late.to_dicts() == [{"user_id": 1, "since": 5, "rows": 2}, {"user_id": 3, "since": 15, "rows": 1}]
    assert result.manifest is not None
    assert result.manifest.counts["late_users"] == 2
    user = read_all(tmp_path / "day2").filter(pl.col("user_id") == 1)
    assert user["timestamp"].to_list() == [5, 10, 20]


def test_a_day_of_another_kind_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "1.parquet", [(1, 1, 10, 1.0)])
    make(Partition(first, buckets=2), tmp_path / "day1")
    with_strings = write(tmp_path / "2.parquet", [("a", 1, 10, 1.0)])
    with pytest.raises(ContractError, match="user_id String"):
        make(Partition(with_strings, append_to=tmp_path / "day1"), tmp_path / "day2")
    other = write(tmp_path / "3.parquet", [(1, 1, 11, 1.0)])
    with pytest.raises(ContractError, match="2 buckets of user_id"):
        make(Partition(other, append_to=tmp_path / "day1", buckets=3), tmp_path / "day2")
    with pytest.raises(ContractError, match="no column `session_id`"):
        make(Partition(other, by="session_id"), tmp_path / "day2")
    with pytest.raises(ContractError, match="no buckets"):
        make(Partition(other, append_to=first), tmp_path / "day2")


def test_milliseconds_are_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", [(1, 1, 1_700_000_000_000, 1.0)])
    with pytest.raises(ContractError, match="not epoch seconds"):
        make(Partition(log), tmp_path / "out")


def test_requests_are_partitioned_beside_their_log(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    pl.DataFrame(
        {"request_id": ["a", "b"], "user_id": [5, 6], "timestamp": [2, 1], "candidates": [[1, 2], [3]]}
    ).write_parquet(path)
    make(Partition(path, buckets=2, contract="requests"), tmp_path / "out")
    requests = open_events(open_table(tmp_path / "out", "requests")).source
    bucket = bucket_of(pl.Series([6]), 2)[0]
    assert requests.read(bucket).filter(pl.col("user_id") == 6)["candidates"].to_list() == [[3]]


events_of_a_week = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.integers(0, 3),
        st.integers(0, 7 * DAY - 1),
        st.integers(0, 3),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=8, deadline=None)
@given(events=events_of_a_week, strings=st.booleans())
def test_seven_live_nights_equal_one_backfill(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[int, int, int, int, int]], strings: bool
) -> None:
    folder = tmp_path_factory.mktemp("week")
    log = pl.DataFrame(events, schema=["user_id", "item_id", "timestamp", "delay", "value"], orient="row")
    log = log.with_columns(ingested_at=pl.col("timestamp") + pl.col("delay") * DAY).drop("delay")
    if strings:
        log = log.with_columns(pl.format("用户{}", "user_id").alias("user_id"))
    log.write_parquet(folder / "all.parquet")
    make(Partition(folder / "all.parquet", buckets=3), folder / "backfill")
    live: Path | None = None
    late_users: set[object] = set()
    for night in range(11):  # late rows trickle in for up to three days after the week
        day = log.filter(pl.col("ingested_at") // DAY == night)
        if day.is_empty():
            continue
        day.write_parquet(folder / f"{night}.parquet")
        stage = Partition(folder / f"{night}.parquet", buckets=3, append_to=live)
        make(stage, folder / f"night-{night}")
        live = folder / f"night-{night}"
        late_users |= set(pl.read_parquet(live / "late_users" / "data" / "part-*.parquet")["user_id"])
    assert live is not None
    assert read_all(live).equals(read_all(folder / "backfill"))
    marked = late_by_definition(log)
    assert late_users == marked


def test_what_is_made_from_seven_nights_is_made_from_one_backfill(tmp_path: Path) -> None:
    log = pl.read_parquet(sample("retail_events")).filter(
        pl.col("timestamp").is_between(1_320_000_000, 1_320_000_000 + 7 * DAY - 1)
    )
    delay = pl.Series([(row * 7919) % 3 * DAY for row in range(len(log))])
    log = log.with_columns(ingested_at=pl.col("timestamp") + delay)
    log.write_parquet(tmp_path / "all.parquet")
    make(Partition(tmp_path / "all.parquet", buckets=3), tmp_path / "backfill")
    live: Path | None = None
    for night in sorted((log["ingested_at"] // DAY).unique()):
        log.filter(pl.col("ingested_at") // DAY == night).write_parquet(tmp_path / f"{night}.parquet")
        make(Partition(tmp_path / f"{night}.parquet", buckets=3, append_to=live), tmp_path / f"night-{night}")
        live = tmp_path / f"night-{night}"
    assert live is not None
    cut = 1_320_000_000 + 4 * DAY
    for name, on in {
        "split": lambda events: Split(events, at=cut),
        "requests": lambda events: Requests(events, start=cut),
        "pairs": lambda events: Pairs(("copurchase",), events=events, until=cut),
    }.items():
        nightly = run(on(live), tmp_path / f"{name}-live", ONE).manifest
        backfill = run(on(tmp_path / "backfill"), tmp_path / f"{name}-backfill", ONE).manifest
        assert nightly is not None
        assert backfill is not None
        assert nightly.content_digest == backfill.content_digest
        assert nightly.quality == backfill.quality


def test_compacting_joins_the_nights_and_forgets_none(tmp_path: Path) -> None:
    first = write(tmp_path / "1.parquet", [(1, 1, 10, 1.0)])
    second = write(tmp_path / "2.parquet", [(1, 2, 5, 1.0)])
    make(Partition(first, buckets=2), tmp_path / "day1")
    make(Partition(second, append_to=tmp_path / "day1"), tmp_path / "day2")
    make(Partition(tmp_path / "day2", buckets=2), tmp_path / "compact")
    assert len(list((tmp_path / "compact" / "data").glob("part-*"))) == 2
    assert read_all(tmp_path / "compact").equals(read_all(tmp_path / "day2"))
    with pytest.raises(ContractError, match="already"):
        make(Partition(second, append_to=tmp_path / "compact"), tmp_path / "day3")


def late_by_definition(log: pl.DataFrame) -> set[object]:
    """Users with a row from before the end of what was there on an earlier night."""
    marked, watermark = set(), None
    for night in range(11):
        day = log.filter(pl.col("ingested_at") // DAY == night)
        if day.is_empty():
            continue
        if watermark is not None:
            marked |= set(day.filter(pl.col("timestamp") <= watermark)["user_id"])
        watermark = max(watermark or 0, day["timestamp"].max())  # type: ignore[call-overload,type-var]
    return marked


def test_two_workers_write_the_same_bytes(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", [(n % 17, n % 5, n * 37 % 101, 1.0 * n) for n in range(300)])
    one = make(Partition(log, buckets=6), tmp_path / "one")
    two = make(Partition(log, buckets=6), tmp_path / "two", RunOptions(workers=2, threads=1))
    assert one.manifest is not None
    assert two.manifest is not None
    assert one.manifest.content_digest == two.manifest.content_digest


def test_a_killed_partition_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = [
        write(tmp_path / f"{day}.parquet", [(n % 17, n % 5, day * 100 + n % 50, 1.0 * n) for n in range(60)])
        for day in range(2)
    ]
    make(Partition(days[0], buckets=4), tmp_path / "day1")
    stage = Partition(days[1], append_to=tmp_path / "day1")
    whole = make(stage, tmp_path / "whole")

    def killed(folder: Path, bucket: int, *, order: tuple[str, ...]) -> pl.DataFrame:
        if bucket == 2:
            raise KeyboardInterrupt
        return sorter.gather(folder, bucket, order=order)

    with monkeypatch.context() as patch:
        patch.setattr("prerank_tools.data.stage.gather", killed)
        with pytest.raises(KeyboardInterrupt):
            make(stage, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("prerank_tools.data.stage.scatter", None)  # it finished, and is not called again
    resumed = make(stage, tmp_path / "out")
    assert resumed.manifest is not None
    assert whole.manifest is not None
    assert resumed.manifest.content_digest == whole.manifest.content_digest


def test_a_dry_run_says_what_would_be_written(tmp_path: Path) -> None:
    log = write(tmp_path / "log.parquet", [(n % 17, n % 5, n, 1.0 * n) for n in range(300)])
    plan = make(Partition(log, buckets=3), tmp_path / "out", replace(ONE, dry_run=True)).plan
    assert (plan["shards"], plan["rows_in"], plan["rows_out"]) == (3, 300, 300)
    assert not (tmp_path / "out").exists()
