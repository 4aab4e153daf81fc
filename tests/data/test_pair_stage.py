"""`data pairs`: searched and bought, bought together, picture and title, in groups of one title."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from prerank_sample_data import sample
from prerank_tools.data.pair_stage import PairKnobs, Pairs
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.run.job import RunOptions, run
from prerank_tools.tables.table import open_table

ONE = RunOptions(workers=1)


def make(stage: Pairs, out: Path) -> pl.DataFrame:
    run(stage, out, ONE)
    return open_table(out, "pairs").read()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.parquet"
    pl.DataFrame(
        {
            "user_id": [1, 1, 1, 1, 1, 2],
            "item_id": ["a", "b", "c", "a", "c", "a"],
            "timestamp": [10, 11, 12, 20, 20, 20],
            "action": ["click", "click", "click", "purchase", "purchase", "purchase"],
            "query": ["tea", "tea", "tea", None, None, None],
        }
    ).write_parquet(path)
    return path


def test_a_search_pair_has_its_query_and_what_was_clicked_in_vain(tmp_path: Path, log: Path) -> None:
    pairs = make(Pairs(("search",), events=log), tmp_path / "out")
    rows = pairs.select("query_text", "item_id", "hard_negatives", "timestamp").rows()
    assert sorted(rows) == [("tea", "a", ["b"], 20), ("tea", "c", ["b"], 20)]
    assert set(pairs["kind"]) == {"search"}


def test_until_hides_later_purchases(tmp_path: Path, log: Path) -> None:
    late = Pairs(("search", "copurchase"), events=log, until=20)
    assert run(late, tmp_path / "out", ONE).manifest.outputs["rows"] == 0  # type: ignore[union-attr]
    result = run(Pairs(("copurchase",), events=log, until=21), tmp_path / "more", ONE)
    assert result.manifest is not None
    assert result.manifest.data_cutoff == 20


def test_copurchases_are_said_to_be_such_and_carry_the_title_of_the_other(tmp_path: Path, log: Path) -> None:
    items = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": ["a", "c"], "title": ["Ａ Tea ", "C"]}).write_parquet(items)
    pairs = make(Pairs(("copurchase",), events=log, items=items), tmp_path / "out")
    assert sorted(pairs.select("query_item_id", "query_text", "item_id", "kind").rows()) == [
        ("a", "Ａ Tea ", "c", "copurchase"),
        ("c", "C", "a", "copurchase"),
    ]


def test_items_that_left_the_catalogue_leave_the_pairs(tmp_path: Path, log: Path) -> None:
    items = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": ["a"], "title": ["A"]}).write_parquet(items)
    pairs = make(Pairs(("copurchase", "search"), events=log, items=items), tmp_path / "out")
    assert pairs.select("kind", "item_id").rows() == [("search", "a")]


def test_twins_under_one_title_share_a_group(tmp_path: Path) -> None:
    items = tmp_path / "items.parquet"
    titles = ["Green Tea", "green  tea", "ｇｒｅｅｎ tea", "Black Tea", None]
    pl.DataFrame({"item_id": range(5), "title": titles, "image_path": ["x.jpg"] * 5}).write_parquet(items)
    pairs = make(Pairs(("image_title",), items=items), tmp_path / "out")
    groups = dict(pairs.select("item_id", "group").rows())
    assert groups[0] == groups[1] == groups[2] != groups[3]
    assert 4 not in groups


def test_the_grocery_items_pair_each_photo_with_its_title(tmp_path: Path) -> None:
    pairs = make(Pairs(("image_title",), items=sample("grocery_items")), tmp_path / "out")
    assert len(pairs) == 81
    assert pairs["query_text"].null_count() == 0


def test_a_large_basket_gives_no_square(tmp_path: Path) -> None:
    log = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": [1] * 500, "item_id": range(500), "timestamp": [5] * 500}).write_parquet(log)
    pairs = make(Pairs(("copurchase",), events=log, knobs=PairKnobs(partners=3)), tmp_path / "out")
    assert len(pairs) == 1500


def test_missing_inputs_and_columns_are_named(tmp_path: Path, log: Path) -> None:
    with pytest.raises(UsageError, match="need --items"):
        make(Pairs(("image_title",), events=log), tmp_path / "out")
    with pytest.raises(ContractError, match="no column `query`"):
        make(Pairs(("search",), events=sample("retail_events")), tmp_path / "out")
    with pytest.raises(ContractError, match="no column `image`"):
        make(Pairs(("image_title",), items=sample("retail_items")), tmp_path / "out")


def test_chinese_queries_and_titles(
    tmp_path: Path, chinese_items: pl.DataFrame, chinese_events: pl.DataFrame
) -> None:
    chinese_items.write_parquet(tmp_path / "items.parquet")
    chinese_events.write_parquet(tmp_path / "log.parquet")
    stage = Pairs(("search", "copurchase"), events=tmp_path / "log.parquet", items=tmp_path / "items.parquet")
    pairs = make(stage, tmp_path / "out")
    search = pairs.filter(pl.col("kind") == "search")
    assert len(search) == 60  # every purchase was clicked from a search
    assert search["query_text"].str.starts_with("搜索").all()
    titles = set(chinese_items["title"])
    assert set(pairs.filter(pl.col("kind") == "copurchase")["query_text"]) <= titles
