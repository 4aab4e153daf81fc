"""The packaged tables: what the README says of them."""

from __future__ import annotations

import io

import polars as pl
import pytest
from PIL import Image

from prerank_sample_data import sample


def test_retail_baskets_share_a_user_and_a_minute() -> None:
    events = pl.read_parquet(sample("retail_events"))
    baskets = events.group_by("basket_id").agg(pl.col("user_id", "timestamp").n_unique())
    assert len(baskets) == 1955
    assert baskets["user_id"].max() == baskets["timestamp"].max() == 1
    assert set(events["item_id"]) <= set(pl.read_parquet(sample("retail_items"))["item_id"])
    assert set(events["action"]) == {"purchase"}


def test_every_grocery_photo_opens() -> None:
    items = pl.read_parquet(sample("grocery_items"))
    assert items["item_id"].to_list() == list(range(81))
    for image in items["image"]:
        assert max(Image.open(io.BytesIO(image)).size) <= 160


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        sample("retail")
