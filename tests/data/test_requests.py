"""`data requests`: one request a basket, negatives that were known and not bought, popularity's own AUC."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank_sample_data import sample
from prerank_tools.data.request_stage import RequestKnobs, Requests
from prerank_tools.data.stage import Partition
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.run.job import Result, RunOptions, run
from prerank_tools.tables.table import open_table

ONE = RunOptions(workers=1)
FEW = RequestKnobs(negatives_per_request=2)


def read(out: Path, kind: str = "") -> pl.DataFrame:
    parts = sorted((out / kind / "data").glob("part-*.parquet"))
    return pl.read_parquet(parts).sort("request_id")


def make(stage: Requests, out: Path) -> Result:
    return run(stage, out, ONE)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.parquet"
    pl.DataFrame(
        {
            "user_id": [1, 2, 2, 3, 1, 1, 2],
            "item_id": ["a", "b", "c", "a", "b", "d", "a"],
            "timestamp": [10, 20, 20, 30, 40, 40, 50],
        }
    ).write_parquet(path)
    return path


def test_a_basket_becomes_a_request_with_its_items_as_positives(tmp_path: Path, log: Path) -> None:
    make(Requests(log, start=40, knobs=FEW), tmp_path / "out")
    requests = read(tmp_path / "out")
    assert requests.select("request_id", "user_id", "timestamp").rows() == [("1-40", 1, 40), ("2-50", 2, 50)]
    first = requests.explode("candidates", "label_purchase").filter(pl.col("request_id") == "1-40")
    # d was never seen before 40: without a catalogue it is no candidate, and its basket keeps b.
    labels = dict(zip(first["candidates"], first["label_purchase"], strict=True))
    assert labels == {"b": 1, "a": 0, "c": 0}


def test_a_catalogue_makes_cold_items_candidates_and_delisted_ones_not(tmp_path: Path, log: Path) -> None:
    items = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": ["a", "b", "d", "new"], "title": ["A", "B", "D", "N"]}).write_parquet(items)
    knobs = RequestKnobs(negatives_per_request=9)
    make(Requests(log, items=items, start=40, knobs=knobs), tmp_path / "out")
    for kind, negatives in (("", {"a"}), ("uniform", {"a", "new"})):
        request = read(tmp_path / "out", kind).filter(pl.col("request_id") == "1-40")
        rows = request.explode("candidates", "label_purchase")
        assert set(rows.filter(pl.col("label_purchase") == 1)["candidates"]) == {"b", "d"}
        assert set(rows.filter(pl.col("label_purchase") == 0)["candidates"]) == negatives


def test_the_period_keeps_whole_baskets_only(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame(
        {
            "user_id": [1, 1, 1, 1, 1, 1, 1],
            "item_id": ["a", "a", "a", "a", "a", "a", "a"],
            "timestamp": [1, 9, 11, 15, 19, 21, 30],
            "basket_id": [0, 1, 1, 2, 3, 3, 4],
        }
    ).write_parquet(path)
    result = make(Requests(path, start=10, until=20, knobs=FEW), tmp_path / "out")
    assert read(tmp_path / "out")["timestamp"].to_list() == [15]
    assert result.manifest is not None
    assert result.manifest.data_cutoff == 19


def test_only_the_action_makes_a_label_and_popularity(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame(
        {
            "user_id": [1, 1, 1, 2],
            "item_id": ["a", "b", "c", "a"],
            "timestamp": [10, 11, 12, 20],
            "action": ["purchase", "click", "purchase", "purchase"],
        }
    ).write_parquet(path)
    make(Requests(path, start=20, knobs=FEW), tmp_path / "out")
    assert sorted(read(tmp_path / "out")["candidates"][0]) == ["a", "c"]
    with pytest.raises(ContractError, match="no event has the action `buy`") as caught:
        make(Requests(path, action="buy"), tmp_path / "other")
    assert caught.value.hint == "--action takes one of click, purchase"


def test_a_late_event_is_not_known_before_it_came(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame(
        {
            "user_id": [1, 2, 3],
            "item_id": ["a", "b", "a"],
            "timestamp": [10, 11, 20],
            "ingested_at": [10, 25, 20],
        }
    ).write_parquet(path)
    make(Requests(path, start=20, knobs=FEW), tmp_path / "out")
    assert read(tmp_path / "out")["candidates"].to_list() == [["a"]]


def test_two_baskets_at_one_time_get_two_ids(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame(
        {
            "user_id": [1, 1, 1],
            "item_id": [7, 7, 8],
            "timestamp": [1, 5, 5],
            "basket_id": ["x", "y", "z"],
        }
    ).write_parquet(path)
    items = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": [7, 8]}).write_parquet(items)
    make(Requests(path, items=items, start=5, knobs=FEW), tmp_path / "out")
    assert read(tmp_path / "out")["request_id"].to_list() == ["1-5", "1-5.2"]


def test_an_empty_period_is_refused(tmp_path: Path, log: Path) -> None:
    with pytest.raises(UsageError, match="no events"):
        make(Requests(log, start=1000), tmp_path / "out")
    with pytest.raises(ContractError, match="no basket"):
        make(Requests(log, until=15), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_popularity_is_strong_against_uniform_negatives_and_weak_against_its_own(tmp_path: Path) -> None:
    result = make(Requests(sample("retail_events"), start=1_318_291_200), tmp_path / "out")
    assert result.manifest is not None
    auc = result.manifest.quality["popularity_auc"]
    assert auc["uniform"] > 0.6
    assert auc["popularity"] < 0.5
    assert (
        open_table(tmp_path / "out", "requests").rows == open_table(tmp_path / "out/uniform", "requests").rows
    )


def test_requests_do_not_depend_on_buckets_workers_or_later_events(tmp_path: Path) -> None:
    events = pl.read_parquet(sample("retail_events"))
    cut, end = 1_310_000_000, 1_312_000_000
    events.filter(pl.col("timestamp") < end).write_parquet(tmp_path / "short.parquet")
    run(Partition(sample("retail_events"), buckets=8), tmp_path / "events", ONE)
    stage = Requests(tmp_path / "short.parquet", start=cut, until=end)
    make(stage, tmp_path / "short")
    other = replace(stage, events=tmp_path / "events")
    run(other, tmp_path / "long", RunOptions(workers=2, threads=1))
    for kind in ("", "uniform"):
        assert read(tmp_path / "short", kind).equals(read(tmp_path / "long", kind))


def test_a_dry_run_counts_the_requests(tmp_path: Path, log: Path) -> None:
    plan = run(Requests(log, start=40, knobs=FEW), tmp_path / "out", replace(ONE, dry_run=True)).plan
    assert plan["rows_out"] == 2


def test_uniform_can_be_the_main_table(tmp_path: Path, log: Path) -> None:
    make(Requests(log, start=40, knobs=FEW), tmp_path / "one")
    make(Requests(log, start=40, negatives="uniform", knobs=FEW), tmp_path / "other")
    assert read(tmp_path / "one", "uniform").equals(read(tmp_path / "other"))
    assert read(tmp_path / "one").equals(read(tmp_path / "other", "popularity"))


def test_a_chinese_log(tmp_path: Path, chinese_items: pl.DataFrame, chinese_events: pl.DataFrame) -> None:
    chinese_items.write_parquet(tmp_path / "items.parquet")
    chinese_events.write_parquet(tmp_path / "log.parquet")
    stage = Requests(tmp_path / "log.parquet", items=tmp_path / "items.parquet", start=1_701_000_000)
    make(stage, tmp_path / "out")
    requests = read(tmp_path / "out")
    assert requests["user_id"].str.starts_with("用户").all()
    assert set(requests["label_purchase"].list.sum()) == {2}


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 40)), min_size=5, max_size=50
    ),
    start=st.integers(0, 30),
    strings=st.booleans(),
)
def test_candidates_are_known_distinct_and_labelled_right(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int]], start: int, strings: bool
) -> None:
    folder = tmp_path_factory.mktemp("requests")
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    if strings:
        log = log.with_columns(
            pl.format("u{}", "user_id").alias("user_id"), pl.format("商品{}", "item_id").alias("item_id")
        )
    log.write_parquet(folder / "log.parquet")
    try:
        make(Requests(folder / "log.parquet", start=start, knobs=FEW), folder / "out")
    except (ContractError, UsageError):
        return
    for kind in ("", "uniform"):
        for request in read(folder / "out", kind).to_dicts():
            before = set(log.filter(pl.col("timestamp") < request["timestamp"])["item_id"])
            mine = (pl.col("user_id") == request["user_id"]) & (pl.col("timestamp") == request["timestamp"])
            bought = set(log.filter(mine)["item_id"])
            candidates, labels = request["candidates"], request["label_purchase"]
            assert len(candidates) == len(set(candidates)) == len(labels)
            assert set(candidates) <= before
            assert [item in bought for item in candidates] == [label == 1 for label in labels]
            assert {item for item, label in zip(candidates, labels, strict=True) if label} == bought & before
