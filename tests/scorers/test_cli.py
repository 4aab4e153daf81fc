"""The lines that users type: `train scorer`, `score`, `eval scores`, `data features`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import polars as pl
import pytest

from prerank_cli.main import call

SPEC = importlib.util.spec_from_file_location("scorers_shop", Path(__file__).with_name("shop.py"))
assert SPEC is not None and SPEC.loader is not None
shop = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(shop)


def test_train_score_and_eval_as_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.write_shop(tmp_path, strings=True)
    monkeypatch.chdir(tmp_path)
    requests = pl.read_parquet("r.parquet")
    requests.filter(pl.col("timestamp") < shop.CUT).write_parquet("train.parquet")
    requests.filter(pl.col("timestamp") >= shop.CUT).write_parquet("r.parquet")
    Path("t.toml").write_text("[train.scorer.training]\nepochs = 1\n")
    run = "--threads 1 --workers 1"
    inputs = "--items i.parquet --embeddings emb.parquet --users users.parquet --events e.parquet"
    train = (
        f"train scorer --requests train.parquet {inputs} --until {shop.CUT} --config t.toml -o scorer/ {run}"
    )
    assert call(train.split()) == 0
    assert call(f"score --requests r.parquet --model scorer/ {inputs} -o scores.parquet {run}".split()) == 0
    capsys.readouterr()
    measure = "eval scores scores.parquet --requests r.parquet --events e.parquet --resamples 5 --json"
    assert call(measure.split()) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["click"]) >= {"positives", "scores", "popularity", "random"}
    assert call(f"data features --events e.parquet --requests r.parquet -o features/ {run}".split()) == 0
    features = pl.read_parquet("features/user_features/data/*.parquet")
    assert features.columns[:2] == ["user_id", "as_of"]


def test_a_scorer_that_has_seen_the_requests_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = shop.write_shop(tmp_path)
    shop.trained(tmp_path, paths, until=None)
    monkeypatch.chdir(tmp_path)
    line = "score --requests r.parquet --model scorer/ --items i.parquet --embeddings emb.parquet "
    assert call([*line.split(), "--users", "users.parquet", "--events", "e.parquet", "-o", "s.parquet"]) == 3
    told = capsys.readouterr().err
    assert "error: " in told and "hint: fit it again with --until" in told
    assert not Path("s.parquet").exists()


def test_an_unknown_knob_and_a_folder_that_is_no_scorer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.write_shop(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("t.toml").write_text("[train.scorer]\ntowers = 4\n")
    inputs = "--requests r.parquet --items i.parquet --embeddings emb.parquet --events e.parquet"
    assert call(f"train scorer {inputs} --config t.toml -o scorer/".split()) == 2
    Path("empty").mkdir()
    assert call(f"score {inputs} --model empty/ -o s.parquet".split()) == 3
    assert "not a scorer" in capsys.readouterr().err
