"""Make the packaged tables from their sources: `python sample_data/build.py SOURCE [OUTPUT]` (folders)."""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

from prerank_tools.tables.parquet import write_parquet


def build(source: Path, output: Path) -> None:
    """Write the three tables; `source` holds `online-retail-sample/` and `grocery-store-items/`."""
    retail, grocery = source / "online-retail-sample", source / "grocery-store-items"
    write_parquet(retail_items(pl.read_parquet(retail / "items.parquet")), output / "retail_items.parquet")
    events = retail_events(pl.read_parquet(retail / "interactions.parquet"))
    write_parquet(events, output / "retail_events.parquet")
    items = grocery_items(pl.read_csv(grocery / "items.csv"), grocery)
    write_parquet(items, output / "grocery_items.parquet")


def retail_items(items: pl.DataFrame) -> pl.DataFrame:
    """item_id, title, price (the median price the item was sold at, GBP)."""
    return items.select("item_id", "title", price="price_median").sort("item_id")


def retail_events(interactions: pl.DataFrame) -> pl.DataFrame:
    """One purchase a row; `value` is quantity x unit price, a basket what a user bought in one minute."""
    basket = pl.format("{}-{}", "user_id", "timestamp")
    return interactions.select(
        pl.col("user_id").cast(pl.Int64),
        "item_id",
        "timestamp",
        action=pl.lit("purchase"),
        value=(pl.col("quantity") * pl.col("price")).round(2),
        quantity=pl.col("quantity"),
        basket_id=basket,
    ).sort("timestamp", "user_id", "item_id")


def grocery_items(items: pl.DataFrame, folder: Path) -> pl.DataFrame:
    """item_id, title, category, subcategory, description, image (JPEG bytes)."""
    images = [(folder / path).read_bytes() for path in items["image"]]
    return items.with_columns(
        pl.col("item_id").cast(pl.Int64), pl.Series("image", images, dtype=pl.Binary)
    ).sort("item_id")


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent)
