"""`eval gsu`: rankings by cosine, recall against an exact search."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from prerank_cli.main import call
from prerank_tools.errors import ContractError
from prerank_tools.gsu.eval_stage import evaluate_gsu


def write_gsu(path: Path, sims: list[list[float]], positions: list[list[int]]) -> Path:
    tiers = np.zeros((4, 22), dtype=np.uint8)
    tiers[np.arange(4), [20, 15, 12, 0]] = [1, 2, 1, 0]
    pl.DataFrame(
        {
            "request_id": [1, 1, 2, 2],
            "item_id": ["a", "b", "a", "b"],
            "has_vector": [True, True, True, False],
            "n_valid": [2, 2, 1, 0],
            "positions": pl.Series(positions, dtype=pl.List(pl.UInt32)),
            "sims": pl.Series(sims, dtype=pl.List(pl.Float32)),
            "simtier": pl.Series("simtier", tiers.tolist(), dtype=pl.Array(pl.UInt8, 22)),
        }
    ).write_parquet(path)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_gsu(tmp_path / "gsu.parquet", [[0.9, 0.2], [0.5, 0.4], [0.1], []], [[0, 1], [0, 1], [0], []])


def test_cosines_rank_the_labels(table: Path, tmp_path: Path) -> None:
    pl.DataFrame(
        {
            "request_id": [1, 2], "user_id": ["u", "v"], "timestamp": [5, 6],
            "candidates": [["a", "b"], ["a", "b"]],
            "label_click": [[1, 0], [0, 1]],
        }
    ).write_parquet(tmp_path / "r.parquet")  # fmt: skip
    report = evaluate_gsu(table, requests=tmp_path / "r.parquet")
    assert report["rows"] == 4 and report["empty_share"] == 0.25 and report["without_vector_share"] == 0.25
    # User u is ranked right, v wrong; over both, positives .9 and none against .5 and .1: two of four.
    assert report["click"]["top_sim"] == {"auc": 0.5, "gauc": 0.5, "users": 2, "dropped": 0}


def test_recall_against_an_exact_search(table: Path, tmp_path: Path) -> None:
    other = write_gsu(tmp_path / "other.parquet", [[0.9], [0.5, 0.1], [0.1], []], [[0], [0, 7], [0], []])
    assert evaluate_gsu(other, against=table)["against"] == {
        "rows": 4,
        "recall": 0.6,
        "equal_simtier_share": 1.0,
    }


def test_histograms_alone_are_enough(table: Path, tmp_path: Path) -> None:
    pl.read_parquet(table).drop("sims", "positions").write_parquet(tmp_path / "tiers.parquet")
    report = evaluate_gsu(tmp_path / "tiers.parquet")
    assert report["mean_kept"] == 1.0 and report["empty_share"] == 0.25


def test_requests_without_labels_are_refused(table: Path, tmp_path: Path) -> None:
    pl.DataFrame(
        {"request_id": [1], "user_id": ["u"], "timestamp": [5], "candidates": [["a"]]}
    ).write_parquet(tmp_path / "r.parquet")
    with pytest.raises(ContractError, match="no column `label_<task>`"):
        evaluate_gsu(table, requests=tmp_path / "r.parquet")


def test_the_command_prints_json(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["eval", "gsu", str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4
