"""`data features`: two tables, past-only, day by day, the same whatever the later log holds."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from prerank_tools.features.stage import FeatureConfig, Features
from prerank_tools.features.statistics import DAY
from prerank_tools.run.job import RunOptions, run

DAYS = [1, 1, 3, 3, 5]


def write_log(folder: Path, *, strings: bool, later: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    events = pl.DataFrame(
        {"user_id": [1, 1, 2, 2, 1], "item_id": [7, 8, 7, 7, 7], "timestamp": [d * DAY + 5 for d in DAYS]}
    )
    if later:
        after = pl.DataFrame({"user_id": [1, 2], "item_id": [8, 8], "timestamp": [6 * DAY, 9 * DAY]})
        events = pl.concat([events, after])
    requests = pl.DataFrame(
        {
            "request_id": [1, 2],
            "user_id": [1, 2],
            "timestamp": [4 * DAY + 9, 6 * DAY],
            "candidates": [[7, 8], [7, 9]],
        }
    )
    if strings:
        events = events.cast({"user_id": pl.String, "item_id": pl.String})
        requests = requests.cast({"user_id": pl.String, "candidates": pl.List(pl.String)})
    events.write_parquet(folder / "e.parquet")
    requests.write_parquet(folder / "r.parquet")


def features(folder: Path, out: str = "f", **options: object) -> dict[str, pl.DataFrame]:
    stage = Features(folder / "e.parquet", folder / "r.parquet", **options)  # type: ignore[arg-type]
    run(stage, folder / out, RunOptions(workers=1, threads=1))
    names = ("user_features", "item_features")
    return {n: pl.read_parquet(folder / out / n / "data" / "*.parquet").sort(pl.all()) for n in names}


@pytest.mark.parametrize("strings", [False, True])
def test_features_golden(tmp_path: Path, strings: bool) -> None:
    write_log(tmp_path, strings=strings)
    found = features(tmp_path)
    as_id = str if strings else int
    columns = ["user_id", "as_of", "count_1d", "count_7d", "count_30d", "count_all", "recency_s"]
    assert found["user_features"].columns == columns
    assert found["user_features"].rows() == [
        (as_id(1), 4 * DAY, 0, 2, 2, 2, 3 * DAY - 5),
        (as_id(2), 6 * DAY, 0, 2, 2, 2, 3 * DAY - 5),
    ]
    assert found["item_features"].rows() == [
        (as_id(7), 4 * DAY, 2, 3, 3, 3, DAY - 5),
        (as_id(7), 6 * DAY, 1, 4, 4, 4, DAY - 5),
        (as_id(8), 4 * DAY, 0, 1, 1, 1, 3 * DAY - 5),
        (as_id(9), 6 * DAY, 0, 0, 0, 0, -1),
    ]


def test_later_events_change_no_row(tmp_path: Path) -> None:
    write_log(tmp_path / "a", strings=False)
    write_log(tmp_path / "b", strings=False, later=True)
    before, after = features(tmp_path / "a"), features(tmp_path / "b")
    assert all(before[name].equals(after[name]) for name in before)


def test_a_catalogue_adds_its_items_for_every_day(tmp_path: Path) -> None:
    write_log(tmp_path, strings=False)
    pl.DataFrame({"item_id": [7, 70]}).write_parquet(tmp_path / "i.parquet")
    found = features(tmp_path, items=tmp_path / "i.parquet")["item_features"]
    assert found.filter(item_id=70)["as_of"].to_list() == [4 * DAY, 6 * DAY]


def test_windows_are_config_keys(tmp_path: Path) -> None:
    write_log(tmp_path, strings=False)
    found = features(tmp_path, config=FeatureConfig(windows=(3 * DAY, 2 * DAY)))["user_features"]
    assert found["count_3d"].to_list() == [2, 2]
    assert found["count_2d"].to_list() == [0, 0]
