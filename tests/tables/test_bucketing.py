"""Buckets: the same for ever, complete, and read in one order however the rows arrived."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank_tools.errors import ContractError
from prerank_tools.tables import bucketing
from prerank_tools.tables.bucketing import bucket_of, bucketed, default_buckets, hash_ids, splitmix64
from prerank_tools.tables.events import bucket_requests, known_at, open_events
from prerank_tools.tables.table import open_table


def test_buckets_are_golden() -> None:
    # Changing any of these moves every user of every stored table to another bucket.
    assert bucket_of(pl.Series([0, 1, 2, -1]), 1000).to_list() == [535, 465, 110, 936]
    assert bucket_of(pl.Series(["u1", "用户", "a"]), 1000).to_list() == [632, 991, 774]
    assert (
        bucket_of(pl.Series([7], dtype=pl.Int32), 1000).to_list() == bucket_of(pl.Series([7]), 1000).to_list()
    )


def test_splitmix64_is_the_published_one() -> None:
    # First outputs of the reference generator seeded with 0.
    seeds = pl.Series([0, 0x9E3779B97F4A7C15], dtype=pl.UInt64).to_numpy()
    assert [hex(word) for word in splitmix64(seeds)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


def test_a_null_id_has_no_bucket() -> None:
    with pytest.raises(ContractError, match="user_id"):
        hash_ids(pl.Series("user_id", [1, None]))


@given(st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1)), min_size=1), st.integers(1, 300))
def test_a_bucket_depends_on_the_id_alone(ids: list[int], buckets: int) -> None:
    together = bucket_of(pl.Series(ids, dtype=pl.Int64), buckets).to_list()
    alone = [bucket_of(pl.Series([one], dtype=pl.Int64), buckets)[0] for one in ids]
    assert together == alone
    assert all(0 <= bucket < buckets for bucket in together)


@given(st.lists(st.text(), min_size=1), st.integers(1, 300))
def test_a_string_is_bucketed_by_its_text(ids: list[str], buckets: int) -> None:
    together = bucket_of(pl.Series(ids), buckets).to_list()
    assert together == [bucket_of(pl.Series([one]), buckets)[0] for one in ids]


def test_ids_spread_evenly() -> None:
    for ids in (pl.Series(range(10_000)), pl.Series([f"user-{n}" for n in range(10_000)])):
        counts = bucket_of(ids, 10).value_counts()["count"]
        assert counts.min() > 900
        assert counts.max() < 1100


def log(folder: Path, users: list[object]) -> Path:
    path = folder / "events.parquet"
    pl.DataFrame(
        {
            "user_id": users,
            "item_id": [f"i{n % 3}" for n in range(len(users))],
            "timestamp": [1_700_000_000 - n for n in range(len(users))],
            "value": [float(n) for n in range(len(users))],
        }
    ).write_parquet(path)
    return path


@pytest.mark.parametrize("users", [[3, 1, 2, 1, 3, 9], ["b", "a", "用户", "a", "b", "z"]])
def test_an_unbucketed_log_is_bucketed_while_it_is_read(tmp_path: Path, users: list[object]) -> None:
    events = open_events(open_table(log(tmp_path, users), "events"), buckets=4)
    read = [events.read(bucket, ["value"]) for bucket in range(4)]
    together = pl.concat(read)
    assert together.columns == ["user_id", "timestamp", "item_id", "value"]
    assert sorted(together["value"]) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    for bucket, frame in enumerate(read):
        assert set(bucket_of(frame["user_id"], 4)) <= {bucket}
        assert frame.equals(frame.sort("user_id", "timestamp", "item_id"))
    assert [shard.rows for shard in events.shards()] == [len(frame) for frame in read]


def test_until_and_lag_hide_what_was_not_known(tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    pl.DataFrame(
        {
            "user_id": [1, 1, 1, 1],
            "item_id": [1, 2, 3, 4],
            "timestamp": [100, 110, 120, 130],
            "ingested_at": [101, 125, 120, 130],
        }
    ).write_parquet(path)
    events = open_events(open_table(path, "events"), buckets=1)
    assert events.read(0, until=130)["item_id"].to_list() == [1, 2, 3]
    assert events.read(0, until=125)["item_id"].to_list() == [1, 3]
    assert events.read(0, until=130, lag=10)["item_id"].to_list() == [1]
    assert known_at(events.read(0), lag=5).to_list() == [106, 130, 125, 135]


def test_rows_without_a_user_are_in_no_bucket(tmp_path: Path) -> None:
    events = open_events(open_table(log(tmp_path, [1, None, 2]), "events"), buckets=2)
    assert sum(len(events.read(bucket)) for bucket in range(2)) == 2
    assert len(events.source.read(-1)) == 1


def test_requests_follow_the_buckets_of_the_log(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    pl.DataFrame(
        {"request_id": ["a", "b"], "user_id": [5, 6], "timestamp": [1, 2], "candidates": [[1], [2]]}
    ).write_parquet(path)
    requests = bucket_requests(open_table(path, "requests"), 8)
    assert requests.read(bucket_of(pl.Series([5]), 8)[0], ["request_id"])["request_id"].to_list() == ["a"]


def test_a_large_log_is_refused_with_the_line_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucketing, "UNBUCKETED_ROWS", 2)
    table = open_table(log(tmp_path, [1, 2, 3]), "events")
    with pytest.raises(ContractError) as caught:
        bucketed(table, buckets=8)
    assert "prerank data partition" in caught.value.hint
    assert "--by user_id --buckets 8 -o" in caught.value.hint
    asked = tmp_path / "requests.parquet"
    rows = {"request_id": [1, 2, 3], "user_id": [1, 2, 3], "timestamp": [1, 2, 3], "item_id": [1, 2, 3]}
    pl.DataFrame(rows).write_parquet(asked)
    with pytest.raises(ContractError) as caught:
        bucket_requests(open_table(asked, "requests"), 8)
    assert "--buckets 8 --contract requests -o" in caught.value.hint


def test_default_buckets_grow_with_the_rows() -> None:
    assert [default_buckets(rows) for rows in (1, 1 << 20, 100_000_000)] == [4, 8, 512]


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(12)))
def test_the_order_of_arrival_does_not_show(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    rows = pl.DataFrame(
        {
            "user_id": [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3],
            "item_id": [1, 1, 2, 2, 1, 1, 1, 1, 5, 4, 3, 2],
            "timestamp": [10, 10, 10, 10, 20, 20, 30, 30, 5, 5, 5, 5],
            "value": [2.0, 1.0, None, 4.0, 8.0, 7.0, 6.0, 5.0, 1.0, 1.0, 1.0, 1.0],
        }
    )
    folder = tmp_path_factory.mktemp("log")
    rows.write_parquet(folder / "one.parquet")
    rows[order].write_parquet(folder / "other.parquet")
    one = open_events(open_table(folder / "one.parquet", "events"), buckets=1).read(0)
    other = open_events(open_table(folder / "other.parquet", "events"), buckets=1).read(0)
    assert one.equals(other)
