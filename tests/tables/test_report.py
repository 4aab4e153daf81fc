"""`data validate` and `data describe`: what is in a table, what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from prerank_sample_data import sample
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.tables.report import describe, validate


def test_the_sample_tables_are_good() -> None:
    found = {name: validate(sample(name)) for name in ("retail_items", "retail_events", "grocery_items")}
    assert {name: (report["contract"], report["rows"]) for name, report in found.items()} == {
        "retail_items": ("items", 1741),
        "retail_events": ("events", 32175),
        "grocery_items": ("items", 81),
    }
    assert all(report["rows_bad"] == 0 for report in found.values())


def test_the_retail_log_is_described() -> None:
    report = describe(sample("retail_events"))
    assert report["timestamp"] == {"first": "2010-12-01T09:00:00", "last": "2011-12-09T12:16:00"}
    assert report["user_id"]["distinct"] == 600
    assert report["item_id"]["distinct"] == 1741
    assert report["nulls"] == {}


def test_a_bad_row_is_counted_and_too_many_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    rows = {"user_id": [1, None, 3, 4], "item_id": [1, 2, None, 4], "timestamp": [1, 2, 3, 4]}
    pl.DataFrame(rows).write_parquet(path)
    with pytest.raises(ContractError, match="2 of 4 rows") as caught:
        validate(path)
    assert "--max-bad 0.5" in caught.value.hint
    report = validate(path, max_bad=0.5)
    assert report["reasons"] == {"user_id is null": 1, "item_id is null": 1}


def test_labels_as_many_as_candidates(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    rows = {"request_id": [1], "user_id": [1], "timestamp": [1], "candidates": [[1, 2]]}
    pl.DataFrame({**rows, "label_click": [[1]]}).write_parquet(path)
    with pytest.raises(ContractError, match="labels and candidates"):
        validate(path)
    assert describe(path)["candidates"] == {"least": 2.0, "mean": 2.0, "most": 2.0}


def test_the_busiest_user_shows(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    rows = {"user_id": ["大"] * 8 + ["小", "中"], "item_id": range(10), "timestamp": range(10)}
    pl.DataFrame(rows).write_parquet(path)
    spread = describe(path)["user_id"]
    assert spread == {
        "distinct": 3,
        "median_rows": 1,
        "p99_rows": 8,
        "most_rows": 8,
        "share_of_busiest": 0.8,
    }


def test_an_unknown_contract_and_a_file_that_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no contract `item`"):
        validate(sample("retail_items"), "item")
    (tmp_path / "log.parquet").write_text("not Parquet at all")
    with pytest.raises(ContractError, match="not a Parquet file"):
        validate(tmp_path / "log.parquet")
    with pytest.raises(UsageError, match="no such file"):
        validate(tmp_path / "nothing.parquet")


def test_a_flipped_byte_is_an_error_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    whole = sample("retail_events").read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 0x55]) + whole[5001:])
    with pytest.raises(ContractError, match=r"log\.parquet: cannot be read"):
        validate(path)
