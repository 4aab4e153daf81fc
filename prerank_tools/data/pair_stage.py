"""Pairs for training an encoder: what was searched and bought, bought together, shown and named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from prerank_tools.data.pairs import bought_together, searched_then_bought
from prerank_tools.data.stage import basket_codes, events_and_faults
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.stage import Context, Part, Shard, Stage
from prerank_tools.tables.bucketing import hash_ids
from prerank_tools.tables.contracts import split_rows
from prerank_tools.tables.events import as_of, open_events
from prerank_tools.tables.table import read_shard, shards_of

# kind -> the input, and the columns of it that the kind is made from: one of each group
PICTURES = ("image", "image_path")
NEEDS: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "search": ("events", (("query",),)),
    "copurchase": ("events", (("item_id",),)),
    "image_title": ("items", (("title",), PICTURES)),
}


class PairKnobs(BaseModel):
    """How far a purchase may lie from its search, and how many partners an item of a basket gets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window: int = Field(default=86_400, ge=0)  # seconds from search to purchase
    partners: int = Field(default=4, ge=1)
    lag: int = Field(default=0, ge=0)


DEFAULTS = PairKnobs()


@dataclass(frozen=True)
class Pairs(Stage):
    """(query, item) pairs, each with its `kind` and the `group` that a split must keep whole.

    search: a query and the item bought after it, with what was clicked for that query and not bought as hard
    negatives. copurchase: two items of one basket. image_title: an item's title beside its own picture, which
    the trainer takes from the items. `group` is the item's title, so twins under one title stay together.
    """

    kinds: tuple[str, ...]
    events: Path | None = None
    items: Path | None = None
    until: int | None = None
    action: str = "purchase"
    knobs: PairKnobs = DEFAULTS

    name: ClassVar[str] = "data.pairs"
    output: ClassVar[str] = "pairs"

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        """The log and the items, as far as the kinds need them."""
        events = {"events": (self.events, "events")} if self.events else {}
        items = {"items": (self.items, "items")} if self.items else {}
        return {**events, **items}

    def params(self) -> Mapping[str, Any]:
        """Kinds, cut and knobs."""
        named = {"kinds": sorted(self.kinds), "until": self.until, "action": self.action}
        return {**named, **self.knobs.model_dump()}

    def check(self, ctx: Context) -> None:
        """Refuse a kind whose columns are not there."""
        for kind in self.kinds:
            role, columns = NEEDS[kind]
            if role not in ctx.inputs:
                raise UsageError(f"pairs of kind {kind} need --{role}", f"add --{role} PATH")
            schema = ctx.table(role).schema
            for needed in columns:
                if not any(column in schema for column in needed):
                    raise ContractError(
                        f"{ctx.table(role).path}: no column `{needed[0]}`, which pairs of kind {kind} need",
                        f"it has {', '.join(schema)}; add the column, or leave --kind {kind} out",
                    )

    def plan(self, ctx: Context) -> Sequence[Shard]:
        """The buckets of the log, then the rows of the items."""
        shards: list[Shard] = []
        if {"search", "copurchase"} & set(self.kinds):
            shards += open_events(ctx.table("events")).shards()
        if "image_title" in self.kinds:
            shards += [
                Shard(len(shards) + shard.index, shard.path, shard.offset, shard.rows, shard.extra)
                for shard in shards_of(ctx.table("items"))
            ]
        return shards

    def process(self, shard: Shard, ctx: Context) -> Part:
        """The pairs of one bucket of users, or of one block of items."""
        if "bucket" not in shard.extra:
            items, bad = split_rows(read_shard(shard), "items")
            pairs, rows = [_image_title(items)], len(items)
        else:
            events, bad = events_and_faults(open_events(ctx.table("events")), shard.extra["bucket"])
            rows = len(events)
            if self.until is not None:
                events = as_of(events, self.until, lag=self.knobs.lag)
            pairs = [make(events) for make in (self._search, self._copurchase)]
        titles = _titles(ctx) if "items" in ctx.inputs else None
        frame = _finish([self._shape(ctx, part) for part in pairs], titles)
        counts = {f"pairs_{kind}": frame.filter(pl.col("kind") == kind).height for kind in self.kinds}
        return Part(frame, quarantine=bad, counts={"rows_in": rows + len(bad), **counts})

    def kind_of(self, shard: Shard) -> str:
        """Buckets of the log, or rows of the items."""
        return "events" if "bucket" in shard.extra else "items"

    def data_cutoff(self, ctx: Context) -> int | None:
        """The latest event before the cut."""
        if "events" not in ctx.inputs or self.kinds == ("image_title",):
            return super().data_cutoff(ctx)
        times = ctx.table("events").scan(["timestamp"])
        if self.until is not None:
            times = times.filter(pl.col("timestamp") < self.until)
        latest: int | None = times.max().collect().item()
        return latest

    def _search(self, events: pl.DataFrame) -> pl.DataFrame:
        if "search" not in self.kinds:
            return pl.DataFrame()
        rows = events.with_row_index("row")
        key = pl.col("row").first().over("user_id", "item_id")  # one user's interest in one item
        search_n = events["query"].is_not_null().to_numpy()
        found, bought = searched_then_bought(
            rows.select(key)["row"].to_numpy(),
            events["timestamp"].to_numpy(),
            search_n=search_n,
            bought_n=_bought(events, self.action),
            window=self.knobs.window,
        )
        pairs = events[bought].select(
            "user_id", "item_id", "timestamp", query_text=events["query"].gather(found), kind=pl.lit("search")
        )
        pairs = pairs.sort("user_id", "timestamp", "item_id", "query_text")
        clicked = _clicked_only(events, self.action)
        return pairs.join(clicked, on=["user_id", "query_text"], how="left", maintain_order="left")

    def _copurchase(self, events: pl.DataFrame) -> pl.DataFrame:
        if "copurchase" not in self.kinds:
            return pl.DataFrame()
        bought = events.filter(pl.Series(_bought(events, self.action)))
        bought = bought.unique(["user_id", "item_id", "timestamp"], keep="first", maintain_order=True)
        basket_n = basket_codes(bought)
        line = pl.format("{} {} {}", "user_id", "item_id", "timestamp")
        word_n = hash_ids(bought.select(line.alias("line"))["line"])
        one, other = bought_together(basket_n, word_n, partners=self.knobs.partners)
        pairs = bought[other].select(
            "user_id",
            "item_id",
            "timestamp",
            query_item_id=bought["item_id"].gather(one),
            kind=pl.lit("copurchase"),
        )
        pairs = pairs.filter(pl.col("item_id") != pl.col("query_item_id"))
        return pairs.sort("user_id", "timestamp", "query_item_id", "item_id")

    def _shape(self, ctx: Context, pairs: pl.DataFrame) -> pl.DataFrame:
        """The columns of the contract, in one order and of one type, whatever the kind has of them."""
        role = "events" if "events" in ctx.inputs else "items"
        item = ctx.table(role).scan(["item_id"]).collect_schema()["item_id"]
        types: dict[str, Any] = {
            "query_text": pl.String,
            "item_id": item,
            "query_item_id": item,
            "hard_negatives": pl.List(item),
            "kind": pl.String,
            "timestamp": pl.Int64,
        }
        if not pairs.columns:
            return pl.DataFrame(schema=types)
        return pairs.select(
            (pl.col(name) if name in pairs.columns else pl.lit(None)).cast(dtype).alias(name)
            for name, dtype in types.items()
        )


def title_groups(title: pl.Expr) -> pl.Expr:
    """A title without what does not make another product: case, width of characters, runs of blanks."""
    return title.str.normalize("NFKC").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()


def _image_title(items: pl.DataFrame) -> pl.DataFrame:
    pictured = pl.any_horizontal(pl.col(name).is_not_null() for name in PICTURES if name in items.columns)
    named = items.filter(pl.col("title").is_not_null() & pictured)
    return named.select("item_id", query_text="title", kind=pl.lit("image_title")).sort("item_id")


def _bought(events: pl.DataFrame, action: str) -> np.ndarray:
    if "action" not in events.columns:
        return np.ones(len(events), dtype=bool)
    return events.select(pl.col("action") == action).to_series().fill_null(False).to_numpy()


def _clicked_only(events: pl.DataFrame, action: str) -> pl.DataFrame:
    """Per user and query the items that were clicked for it and never bought by that user."""
    bought = pl.Series(_bought(events, action))
    clicks = pl.col("action") == "click" if "action" in events.columns else pl.lit(False)
    clicked = events.filter(clicks & pl.col("query").is_not_null()).rename({"query": "query_text"})
    clicked = clicked.join(events.filter(bought), on=["user_id", "item_id"], how="anti")
    return clicked.group_by("user_id", "query_text").agg(hard_negatives=pl.col("item_id").unique().sort())


def _titles(ctx: Context) -> pl.DataFrame:
    """item_id and title of the catalogue, kept for the next shard."""
    if "titles" not in ctx.cache:
        items = ctx.table("items")
        named = ["item_id", "title"] if "title" in items.schema else ["item_id"]
        rows = items.read(named).drop_nulls("item_id")
        ctx.cache["titles"] = (
            rows if "title" in rows.columns else rows.with_columns(title=pl.lit(None, pl.String))
        )
    titles: pl.DataFrame = ctx.cache["titles"]
    return titles


def _finish(pairs: list[pl.DataFrame], titles: pl.DataFrame | None) -> pl.DataFrame:
    """Add titles and groups; an item that is not in the catalogue leaves."""
    frame = pl.concat(pairs)
    if titles is None:
        return frame.with_columns(group=pl.Series(hash_ids(frame["item_id"]).view(np.int64)))
    _same_type(frame, titles)
    frame = frame.join(titles, on="item_id", how="inner", maintain_order="left")
    asked = titles.rename({"item_id": "query_item_id", "title": "query_title"})
    frame = frame.join(asked, on="query_item_id", how="left", maintain_order="left")
    frame = frame.filter(
        (pl.col("kind") != "copurchase") | pl.col("query_item_id").is_in(titles["item_id"].implode())
    )
    named = pl.coalesce(title_groups(pl.col("title")), pl.col("item_id").cast(pl.String)).alias("group")
    group = hash_ids(frame.select(named).to_series()).view(np.int64)
    frame = frame.with_columns(pl.coalesce("query_text", "query_title").alias("query_text"))
    return frame.drop("title", "query_title").with_columns(group=pl.Series(group, dtype=pl.Int64))


def _same_type(frame: pl.DataFrame, titles: pl.DataFrame) -> None:
    one, other = frame.schema["item_id"], titles.schema["item_id"]
    if one != other:
        raise ContractError(
            f"item_id is {one} in the log and {other} in the items", "write both with one type"
        )
