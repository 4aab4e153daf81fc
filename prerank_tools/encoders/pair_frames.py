"""Pairs and items as contents: which texts and pictures there are, and which of them face each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from prerank_tools.encoders.content_frames import columns_of, image_columns, read_content
from prerank_tools.encoders.pair_batches import PairRows
from prerank_tools.encoders.pictures import Source
from prerank_tools.errors import ContractError
from prerank_tools.tables.table import Table

IMAGE_TITLE = "image_title"


@dataclass(frozen=True)
class PairContents:
    """What the encoder will see: the items first, then the queries; and the pairs between them."""

    pairs: PairRows
    texts: list[str]
    images: list[list[Source]]
    dropped: int  # pairs whose item, or query item, is not in the catalogue or has no readable content
    latest: int | None  # time of the newest pair


def read_pairs(
    pairs: Table,
    items: Table,
    *,
    template: str,
    images: bool,
    root: Path,
    max_bytes: int,
    until: int | None = None,
    category: str | None = None,
) -> PairContents:
    """Join pairs with the content of their items; `until` leaves out later pairs.

    The item of an `image_title` pair shows its picture alone, since its title is the query.
    """
    frame = _until(pairs, until)
    catalogue = _needed_items(frame, items, template, category, images=images)
    content = read_content(catalogue, template=template, images=images, root=root, max_bytes=max_bytes)
    usable = pl.Series(
        [bool(text or pictures) for text, pictures in zip(content.texts, content.images, strict=True)]
    )
    usable &= pl.Series([fault is None for fault in content.faults], dtype=pl.Boolean)
    rows = pl.DataFrame(
        {"id": catalogue["item_id"], "row": pl.int_range(len(catalogue), eager=True), "ok": usable}
    )
    rows = rows.filter(pl.col("ok")).drop("ok")
    asked, known = len(frame), _known(frame, rows)
    query, texts, pictures = _queries(known, len(catalogue), images=images)
    item_P = known["item_row"].to_numpy()
    return PairContents(
        PairRows(
            query,
            item_P,
            _shows_text(known),
            np.r_[np.arange(len(catalogue)), np.full(len(texts), -1)],
            np.r_[_codes(pl.Series(content.texts)), np.full(len(texts), -1)],
            _hard(known, rows),
            _categories(catalogue, category, len(texts)),
        ),
        [*content.texts, *texts],
        [*content.images, *pictures],
        asked - len(known),
        known["timestamp"].max() if "timestamp" in known.columns else None,  # type: ignore[arg-type]
    )


def _until(pairs: Table, until: int | None) -> pl.DataFrame:
    frame = pairs.read()
    if until is None:
        return frame
    if "timestamp" in frame.columns:
        return frame.filter(pl.col("timestamp").is_null() | (pl.col("timestamp") < until))
    if pairs.data_cutoff is None or pairs.data_cutoff >= until:
        raise ContractError(
            f"{pairs.path}: no column `timestamp`, so --until cannot be held",
            "make the pairs with `prerank data pairs --until`, or leave --until out",
        )
    return frame


def _needed_items(
    frame: pl.DataFrame, items: Table, template: str, category: str | None, *, images: bool
) -> pl.DataFrame:
    """The items that pairs name, in the order of their ids."""
    named = [frame["item_id"]]
    if "query_item_id" in frame.columns:
        named.append(frame["query_item_id"].drop_nulls())
    if "hard_negatives" in frame.columns:
        named.append(frame["hard_negatives"].explode().drop_nulls())
    kind = items.scan(["item_id"]).collect_schema()["item_id"]  # integers are read as int64
    if named[0].dtype != kind:
        raise ContractError(
            f"item_id is {named[0].dtype} in the pairs and {kind} in the items", "write both with one type"
        )
    ids = pl.concat([series.cast(kind).alias("item_id") for series in named]).unique()
    columns = ["item_id", *(columns_of(template, items.schema, items.path) if template else [])]
    columns += image_columns(items.schema) if images else []
    if category:
        columns += columns_of(f"{{{category}}}", items.schema, items.path)
    wanted = items.scan(list(dict.fromkeys(columns))).filter(pl.col("item_id").is_in(ids.implode()))
    return wanted.sort("item_id").collect()


def _known(frame: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Pairs whose item, and query item if they have one, can be encoded; with their rows."""
    frame = frame.join(
        rows.rename({"id": "item_id", "row": "item_row"}), on="item_id", how="inner", maintain_order="left"
    )
    if "query_item_id" not in frame.columns:
        return frame
    frame = frame.join(
        rows.rename({"id": "query_item_id", "row": "query_row"}),
        on="query_item_id",
        how="left",
        maintain_order="left",
    )
    return frame.filter(pl.col("query_item_id").is_null() | pl.col("query_row").is_not_null())


def _queries(
    frame: pl.DataFrame, first: int, *, images: bool
) -> tuple[np.ndarray, list[str], list[list[Source]]]:
    """The content row of each pair's query: a query item's own, else one row for each distinct query."""
    none = pl.lit(None)
    has = frame.columns
    asked = frame.select(
        row=pl.col("query_row") if "query_row" in has else none.cast(pl.Int64),
        text=(pl.col("query_text") if "query_text" in has else none.cast(pl.String))
        .fill_null("")
        .str.strip_chars(),
        image=pl.col("query_image") if "query_image" in has and images else none.cast(pl.Binary),
    )
    own = asked.filter(pl.col("row").is_null()).select("text", "image").unique(maintain_order=True)
    empty = own.filter((pl.col("text") == "") & pl.col("image").is_null())
    if len(empty):
        raise ContractError(
            "pairs: a row has neither query_text, query_image nor query_item_id", "drop such rows"
        )
    numbered = own.with_columns(number=pl.int_range(first, first + len(own)))
    rows = asked.join(numbered, on=["text", "image"], how="left", nulls_equal=True, maintain_order="left")
    query_P = rows.select(pl.coalesce("row", "number").cast(pl.Int64)).to_series().to_numpy()
    pictures: list[list[Source]] = [[image] if image else [] for image in own["image"].to_list()]
    return query_P, own["text"].to_list(), pictures


def _shows_text(frame: pl.DataFrame) -> np.ndarray:
    if "kind" not in frame.columns:
        return np.ones(len(frame), dtype=bool)
    return (frame["kind"].fill_null("") != IMAGE_TITLE).to_numpy()


def _hard(frame: pl.DataFrame, rows: pl.DataFrame) -> Sequence[np.ndarray]:
    if "hard_negatives" not in frame.columns or not frame["hard_negatives"].list.len().sum():
        return ()
    row_of = dict(zip(rows["id"].to_list(), rows["row"].to_list(), strict=True))
    return [
        np.array([row_of[item] for item in found or [] if item in row_of], dtype=np.int64)
        for found in frame["hard_negatives"].to_list()
    ]


def _categories(catalogue: pl.DataFrame, category: str | None, queries: int) -> np.ndarray | None:
    if category is None:
        return None
    return np.r_[_codes(catalogue[category].cast(pl.String).fill_null("")), np.full(queries, -1)]


def _codes(texts: pl.Series) -> np.ndarray:
    """Equal texts, equal codes, whatever their case and blanks; -1 for none."""
    plain = texts.cast(pl.String).str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
    codes = plain.rank("dense").cast(pl.Int64).to_numpy()
    return np.where((plain == "").to_numpy(), -1, codes)
