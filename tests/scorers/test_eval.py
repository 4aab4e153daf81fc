"""`eval scores`: known numbers, popularity strictly before the request, cut-off lists, leaks refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from prerank_tools.errors import ContractError
from prerank_tools.scorers.eval_stage import check_time, evaluate_scores


def write(folder: Path) -> tuple[Path, Path, Path]:
    """Two users, three requests; the scorer is right about the first two and tied on the third."""
    requests = pl.DataFrame(
        {
            "request_id": ["a", "b", "c"],
            "user_id": ["u", "v", "v"],
            "timestamp": [100, 200, 300],
            "candidates": [["x", "y"], ["x", "z"], ["y", "z"]],
            "label_buy": [[1, 0], [0, 1], [1, 0]],
        }
    )
    scores = pl.DataFrame(
        {
            "request_id": ["a", "a", "b", "b", "c", "c"],
            "item_id": ["x", "y", "z", "x", "y", "z"],
            "rank": [1, 2, 1, 2, 1, 2],
            "score": [0.9, 0.1, 0.8, 0.2, 0.5, 0.5],
        }
    ).with_columns(pl.col("score").alias("p_buy"))
    events = pl.DataFrame({"user_id": ["w"] * 3, "item_id": ["y", "x", "x"], "timestamp": [50, 100, 150]})
    for name, frame in (("r", requests), ("s", scores), ("e", events)):
        frame.write_parquet(folder / f"{name}.parquet")
    return folder / "s.parquet", folder / "r.parquet", folder / "e.parquet"


def test_metrics_golden(tmp_path: Path) -> None:
    scores, requests, events = write(tmp_path)
    report = evaluate_scores(scores, requests, events=events, ks=(1,), resamples=20)
    assert (report["requests"], report["candidates"], report["users"], report["unscored"]) == (3, 6, 2, 0)
    found = report["buy"]["scores"]
    assert found["recall@1"]["value"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["uauc"]["value"] == pytest.approx((1 + 3.5 / 4) / 2)
    assert found["gauc"]["value"] == pytest.approx((1 * 2 + 3.5 / 4 * 4) / 6)
    assert found["auc"]["value"] == pytest.approx(8.5 / 9)
    assert found["ne"]["value"] == pytest.approx(-np.log([0.9, 0.9, 0.8, 0.8, 0.5, 0.5]).mean() / np.log(2))
    assert found["calibration"] == pytest.approx(1.0)
    assert found["auc"]["low"] <= found["auc"]["value"] <= found["auc"]["high"]


def test_popularity_counts_only_what_came_before(tmp_path: Path) -> None:
    scores, requests, events = write(tmp_path)
    report = evaluate_scores(scores, requests, events=events, ks=(1,), resamples=5)
    # at 100 only y was bought: wrong; at 200 x twice, z never: wrong; at 300 y once, z never: right
    assert report["buy"]["popularity"]["recall@1"]["value"] == pytest.approx(1 / 3)


def test_a_cut_off_list_has_recall_but_no_auc_and_no_ne(tmp_path: Path) -> None:
    scores, requests, _ = write(tmp_path)
    pl.read_parquet(scores).filter(pl.col("rank") == 1).write_parquet(tmp_path / "top.parquet")
    report = evaluate_scores(tmp_path / "top.parquet", requests, ks=(1,), resamples=5)
    assert report["unscored"] == 3
    assert report["buy"]["scores"]["recall@1"]["value"] == 1.0
    assert not {"auc", "ne"} & set(report["buy"]["scores"])


def test_scores_of_other_requests_are_refused(tmp_path: Path) -> None:
    scores, requests, _ = write(tmp_path)
    other = pl.read_parquet(scores).with_columns(pl.format("{}{}", "request_id", "item_id").alias("item_id"))
    other.write_parquet(tmp_path / "o.parquet")
    with pytest.raises(ContractError, match="no candidate"):
        evaluate_scores(tmp_path / "o.parquet", requests)


def test_scores_that_have_seen_the_answers_are_refused(tmp_path: Path) -> None:
    requests: Any = SimpleNamespace(
        scan=lambda columns: pl.LazyFrame({"timestamp": [100, 200]}), path=tmp_path, schema={}
    )
    check_time(SimpleNamespace(data_cutoff=100, path="s"), requests)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="up to 101"):
        check_time(SimpleNamespace(data_cutoff=101, path="s"), requests)  # type: ignore[arg-type]
