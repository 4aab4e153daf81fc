"""The commands on a user's own files with int64 ids: one chain of lines, a second run of one, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from prerank_cli.main import call
from prerank_tools.tables.vectors import numpy_to_vectors

CUT = 1_318_291_200  # 2011-10-11
CHAIN = """
train user --events events.parquet --embeddings emb/ --until 2011-10-11 --config quick.toml -o user_model/
embed users --events events.parquet --embeddings emb/ --model user_model/ --as-of 2011-10-11 -o uemb/
embed users --events events.parquet --embeddings emb/ --model user_model/ --requests r.parquet -o day.parquet
export vectors uemb/ --format fp8 -o uemb_fp8/
"""
QUICK = "[train.user]\nmax_events = 8\n[train.user.model]\nwidth = 16\n[train.user.training]\nepochs = 1\n"


def write_world(folder: Path) -> None:
    """events.parquet (on both sides of the cut), emb/, r.parquet and a quick configuration."""
    rng = np.random.default_rng(0)
    count = 400
    events = pl.DataFrame(
        {
            "user_id": rng.integers(0, 20, count),
            "item_id": rng.integers(0, 15, count),
            "timestamp": CUT + rng.integers(-30, 10, count) * 86_400,
        }
    )
    events.write_parquet(folder / "events.parquet")
    (folder / "emb").mkdir()
    x_ND = rng.standard_normal((15, 6)).astype(np.float32)
    items = pl.DataFrame({"item_id": np.arange(15), "embedding": numpy_to_vectors("embedding", x_ND)})
    items.write_parquet(folder / "emb/part-00000.parquet")
    ids = [1, 2]
    requests = {"request_id": ids, "user_id": ids, "timestamp": [CUT, CUT + 5], "candidates": [[1, 2], [3]]}
    pl.DataFrame(requests).write_parquet(folder / "r.parquet")
    (folder / "quick.toml").write_text(QUICK)


def test_a_chain_of_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = [line.split() for line in CHAIN.strip().splitlines()]
    for words in lines:
        assert call([*words, "--threads", "1", "--workers", "1"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    judged = "eval users uemb/ --events events.parquet --embeddings emb/ --k 3 --json"
    assert call(judged.split()) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["hit_rate"]["probe"]["value"] <= 1
    capsys.readouterr()
    assert call([*lines[1], "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "up to date"
    users = pl.read_parquet("uemb/data/*.parquet")
    assert users.schema["user_id"] == pl.Int64
    assert users["as_of"].unique().to_list() == [CUT]
    packed = pl.read_parquet("uemb_fp8/data/*.parquet")
    assert packed.height == users.height and packed.schema["embedding"] == pl.Array(pl.UInt8, 128)


def test_embedding_needs_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert (
        call(
            [
                "embed",
                "users",
                "--events",
                "events.parquet",
                "--embeddings",
                "emb",
                "--model",
                "emb",
                "-o",
                "u",
            ]
        )
        == 2
    )
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("error: ") and told[1].startswith("hint: ") and "--as-of" in told[1]
    assert not Path("u").exists()


def test_a_folder_that_is_no_user_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = "embed users --events events.parquet --embeddings emb --model emb --as-of 2011-10-11 -o u"
    assert call(words.split()) == 3
    assert "config.json" in capsys.readouterr().err
