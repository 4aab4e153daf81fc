"""The next day: a merged table equals a full run, also with a trained encoder over both modalities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from prerank_tools.encoders.fusion import FusionConfig, build_fusion
from prerank_tools.encoders.loading import EmbedConfig
from prerank_tools.encoders.saved_models import ItemEncoderConfig, save_item_encoder
from prerank_tools.encoders.settings import TextConfig
from prerank_tools.encoders.stage import EmbedItems
from prerank_tools.run.job import RunOptions, run
from prerank_tools.tables.vectors import vectors_to_numpy
from tests.encoders import tiny_models
from tests.encoders.test_embed_items import photo
from tests.encoders.test_text import varied_titles

OPTIONS = RunOptions(threads=2, workers=1)
TITLES = varied_titles(64)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An item encoder as `train encoder` writes it, untrained."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    fusion = build_fusion(FusionConfig(kind="residual", text_dim=32, image_dim=32, dim=16, hidden=32)).eval()
    config = ItemEncoderConfig(template="query: {title}", fusion=fusion.config, pooling="last", max_tokens=9)
    save_item_encoder(folder, config, fusion)
    tiny_models.bert(folder / "text")
    tiny_models.vit(folder / "image")
    return folder


def night(folder: Path, name: str, frame: pl.DataFrame, model: str, **words: Any) -> Path:
    frame.write_parquet(folder / f"{name}.parquet")
    run(EmbedItems(folder / f"{name}.parquet", model=model, **words), folder / name, OPTIONS)
    return folder / name


def table(out: Path) -> pl.DataFrame:
    return pl.read_parquet(out / "data/*.parquet")


def nights() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Monday, and Tuesday: a title edited, a picture edited, a picture gone, one delisted, two new."""
    images = [photo(n) if n % 3 else None for n in range(64)]
    frame = pl.DataFrame({"item_id": [f"i{n:02d}" for n in range(64)], "title": TITLES, "image": images})
    monday, tuesday = frame[:62], frame.filter(pl.col("item_id") != "i05")
    item = pl.col("item_id")
    return monday, tuesday.with_columns(
        title=pl.when(item == "i08").then(pl.lit("blue shoe for men")).otherwise("title"),
        image=pl.when(item == "i10")
        .then(pl.lit(photo(99)))
        .when(item == "i11")
        .then(None)
        .otherwise("image"),
    )


def test_with_exact_batches_the_merged_table_is_the_full_run_byte_for_byte(
    encoder: Path, tmp_path: Path
) -> None:
    monday, tuesday = nights()
    words = {"config": EmbedConfig(exact_batches=True)}
    before = night(tmp_path, "monday", monday, str(encoder), **words)
    merged = night(tmp_path, "merged", tuesday, str(encoder), previous=before, **words)
    full = night(tmp_path, "full", tuesday, str(encoder), **words)
    counts = json.loads((merged / "manifest.json").read_text())["counts"]
    assert (counts["encoded"], counts["reused"], counts["edited"]) == (5, 58, 3)
    parts = [sorted((out / "data").glob("*.parquet")) for out in (merged, full)]
    assert [p.read_bytes() for p in parts[0]] == [p.read_bytes() for p in parts[1]]
    assert "i05" not in set(table(merged)["item_id"])
    modalities = dict(table(merged).select("item_id", "modalities").rows())
    assert (modalities["i10"], modalities["i11"]) == ("text+image", "text")


def test_exact_batches_do_not_see_the_order_and_the_budget(encoder: Path, tmp_path: Path) -> None:
    frame, _ = nights()
    found = []
    for name, rows, budget in (("a", frame, 4096), ("b", frame.reverse(), 1500), ("c", frame[::3], 64)):
        config = EmbedConfig(exact_batches=True, text=TextConfig(token_budget=budget))
        found.append(table(night(tmp_path, name, rows, str(encoder), config=config)))
    assert found[0].equals(found[1])
    assert found[0][::3].equals(found[2])


def test_without_exact_batches_the_merged_table_points_the_same_way(tmp_path: Path) -> None:
    monday, tuesday = (frame.drop("image") for frame in nights())
    before = night(tmp_path, "monday", monday, "minilm")
    merged = table(night(tmp_path, "merged", tuesday, "minilm", previous=before))
    full = table(night(tmp_path, "full", tuesday, "minilm"))
    assert merged["item_id"].to_list() == full["item_id"].to_list()
    assert merged["content_hash"].to_list() == full["content_hash"].to_list()
    x_ND, y_ND = (vectors_to_numpy(frame["embedding"]).astype(np.float64) for frame in (merged, full))
    assert (x_ND * y_ND).sum(1).min() >= 0.9999


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_the_manifest_says_what_made_the_vectors(encoder: Path, tmp_path: Path, dtype: str) -> None:
    frame, _ = nights()
    trained = night(tmp_path, "trained", frame[:4], str(encoder), dtype=dtype)
    found = json.loads((trained / "manifest.json").read_text())
    space = found["quality"]["space"]
    assert len(space["model"]) == 64 and space["template"] == "query: {title}"
    assert (space["pooling"], space["max_tokens"], space["fusion"]) == ("last", 9, "residual")
    assert found["params"]["dtype"] == dtype
    plain = night(tmp_path, "plain", frame[:4].drop("image"), "minilm", template="a {title}", dtype=dtype)
    space = json.loads((plain / "manifest.json").read_text())["quality"]["space"]
    assert len(space["text_model"]) == 64
    assert (space["pooling"], space["template"]) == ("mean", "a {title}")
