"""`data split`: whole baskets, right cutoffs, halves that keep the log's buckets."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank_tools.data.stage import Partition, Split, basket_codes
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.run.job import RunOptions, run
from prerank_tools.tables.events import open_events
from prerank_tools.tables.table import open_table

ONE = RunOptions(workers=1)


def split(folder: Path, log: pl.DataFrame, at: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    log.write_parquet(folder / "log.parquet")
    run(Split(folder / "log.parquet", at=at), folder / "split", ONE)
    halves = (open_parts(folder / "split" / half) for half in ("train", "test"))
    return tuple(halves)  # type: ignore[return-value]


def open_parts(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(sorted((folder / "data").glob("part-*.parquet"))).sort(pl.all())


def test_a_basket_across_the_cut_is_test_and_train_ends_before_it(tmp_path: Path) -> None:
    log = pl.DataFrame(
        {
            "user_id": [1, 1, 1, 2],
            "item_id": ["a", "b", "c", "a"],
            "timestamp": [10, 19, 21, 20],
            "basket_id": ["x", "y", "y", "x"],
        }
    )
    train, test = split(tmp_path, log, 20)
    assert train["item_id"].to_list() == ["a"]
    assert sorted(test["timestamp"]) == [19, 20, 21]
    assert open_table(tmp_path / "split" / "train", "events").data_cutoff == 10
    assert open_table(tmp_path / "split" / "test", "events").data_cutoff == 21


def test_baskets_are_told_by_basket_then_session_then_time() -> None:
    log = pl.DataFrame(
        {
            "user_id": [1, 1, 1, 2, 1, 1],
            "timestamp": [1, 2, 3, 3, 4, 4],
            "basket_id": ["b", "b", None, None, None, None],
            "session_id": [None, None, "b", "b", None, None],
        }
    )
    assert basket_codes(log).tolist() == [0, 0, 1, 2, 3, 3]
    assert basket_codes(log.drop("basket_id", "session_id")).tolist() == [0, 1, 2, 3, 4, 4]


def test_a_cut_outside_the_log_names_its_span(tmp_path: Path) -> None:
    log = pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "timestamp": [0, 86_400]})
    with pytest.raises(UsageError) as caught:
        split(tmp_path, log, 10**9)
    assert caught.value.hint == "its events lie from 0 (1970-01-01T00:00:00) to 86400 (1970-01-02T00:00:00)"


def test_the_folder_of_both_halves_names_them(tmp_path: Path) -> None:
    split(tmp_path, pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "timestamp": [5, 15]}), 10)
    with pytest.raises(ContractError) as caught:
        open_table(tmp_path / "split", "events")
    assert caught.value.hint == f"one of {tmp_path}/split/test, {tmp_path}/split/train?"


def test_the_halves_of_a_partitioned_log_are_partitioned(tmp_path: Path) -> None:
    log = pl.DataFrame({"user_id": range(20), "item_id": [1] * 20, "timestamp": range(20)})
    log.write_parquet(tmp_path / "log.parquet")
    run(Partition(tmp_path / "log.parquet", buckets=4), tmp_path / "events", ONE)
    run(Split(tmp_path / "events", at=10), tmp_path / "split", ONE)
    train = open_events(open_table(tmp_path / "split" / "train", "events"))
    assert (train.source.partitioned, train.buckets) == (True, 4)
    assert sorted(pl.concat([train.read(bucket) for bucket in range(4)])["user_id"]) == list(range(10))


def test_a_chinese_log_with_sessions(tmp_path: Path, chinese_events: pl.DataFrame) -> None:
    cut = 1_700_000_000 + 20 * 86_400
    train, test = split(tmp_path, chinese_events, cut)
    assert len(train) + len(test) == len(chinese_events)
    assert not set(train["session_id"]) & set(test["session_id"])
    assert train["timestamp"].max() < cut  # type: ignore[operator]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 50), st.one_of(st.none(), st.integers(0, 3))),
        min_size=2,
        max_size=30,
    ),
    st.integers(1, 50),
    st.booleans(),
)
def test_no_row_is_lost_and_no_basket_straddles(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int | None]], at: int, strings: bool
) -> None:
    log = pl.DataFrame(
        rows,
        schema={"user_id": pl.Int64, "timestamp": pl.Int64, "basket_id": pl.Int64},
        orient="row",
    ).with_columns(item_id=pl.int_range(pl.len()))
    if strings:
        log = log.with_columns(pl.format("u{}", "user_id").alias("user_id"))
    times = log["timestamp"]
    if not times.min() < at <= times.max():  # type: ignore[operator]
        return
    train, test = split(tmp_path_factory.mktemp("split"), log, at)
    assert sorted([*train["item_id"], *test["item_id"]]) == list(range(len(log)))
    assert train.is_empty() or train["timestamp"].max() < at  # type: ignore[operator]
    baskets = ["user_id", "basket_id"]
    named = [half.drop_nulls("basket_id").select(baskets).unique() for half in (train, test)]
    assert named[0].join(named[1], on=baskets).is_empty()
