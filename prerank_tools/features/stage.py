"""`data features`: point-in-time statistics of every user and item that the requests name, day by day."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from prerank_tools.features.statistics import DAY, WINDOWS, PastCounts, day_of, statistic_names, statistics
from prerank_tools.stage import Context, Part, Shard, Stage
from prerank_tools.tables.bucketing import default_buckets
from prerank_tools.tables.events import known_at
from prerank_tools.tables.spill import Spill, blocks_of, blocks_of_requests, spilled, spilled_blocks

SIDES = ("user", "item")
COUNTED_ROWS = 1 << 17  # events counted at a time


class FeatureConfig(BaseModel):
    """How far back to look and how late the log may be; both in seconds (ours: 1 d, 7 d, 30 d, all)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    windows: tuple[int, ...] = Field(default=WINDOWS, min_length=1)
    granularity: int = Field(default=DAY, ge=1)
    lag: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class Features(Stage):
    """user_features (user_id, as_of, count_*, recency_s) and item_features (item_id, as_of, ...).

    `as_of` is the request's time rounded down to a UTC day; a statistic holds what was known strictly before.
    """

    name: ClassVar[str] = "data.features"
    tables: ClassVar[Mapping[str, str]] = {"user_features": "user_features", "item_features": "item_features"}

    events: Path
    requests: Path
    items: Path | None = None
    config: FeatureConfig = field(default_factory=FeatureConfig)

    @property
    def folder_only(self) -> bool:
        """Two tables: a folder."""
        return True

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        """The log, the requests, and the catalogue where every item is wanted."""
        found = {"events": (self.events, "events"), "requests": (self.requests, "requests")}
        return found | ({"items": (self.items, "items")} if self.items else {})

    def params(self) -> Mapping[str, Any]:
        """The windows, the granularity and the lag."""
        return self.config.model_dump(mode="json")

    def plan(self, ctx: Context) -> Sequence[Shard]:
        """Buckets of users, then buckets of items: each holds the whole past of its ids."""
        buckets = default_buckets(ctx.table("events").rows)
        rows = ctx.table("events").rows // buckets
        return [
            Shard(
                index, str(self.events), rows=rows, extra={"side": side, "bucket": bucket, "buckets": buckets}
            )
            for index, (side, bucket) in enumerate((s, b) for s in SIDES for b in range(buckets))
        ]

    def prepare(self, ctx: Context) -> None:
        """Bucket the log and what is asked once: a shard reads its own rows only."""
        buckets = default_buckets(ctx.table("events").rows)
        log = {side: Spill(ctx.scratch / side, by=f"{side}_id", buckets=buckets) for side in SIDES}
        events, late = ctx.table("events"), "ingested_at" in ctx.table("events").schema
        time = ["timestamp", *(["ingested_at"] if late else [])]
        for block in blocks_of(events, ["user_id", "item_id", *time]):
            for side in SIDES:
                log[side].add(block.select(f"{side}_id", *time).drop_nulls([f"{side}_id", "timestamp"]))
        asked = {
            side: Spill(ctx.scratch / f"asked-{side}", by=f"{side}_id", buckets=buckets) for side in SIDES
        }
        days = self._spill_asked(asked, ctx)
        if self.items is not None:
            every = Spill(ctx.scratch / "every-item", by="item_id", buckets=buckets)
            for block in blocks_of(ctx.table("items"), ["item_id"]):
                every.add(block.drop_nulls())
            every.close()
        days.to_frame("as_of").write_ipc(ctx.scratch / "days.arrow")
        for runs in (*log.values(), *asked.values()):
            runs.close()

    def process(self, shard: Shard, ctx: Context) -> Part:
        """Statistics of one bucket of users or of items."""
        side, bucket = shard.extra["side"], shard.extra["bucket"]
        key = f"{side}_id"
        asked = spilled(ctx.scratch / f"asked-{side}", bucket)
        if side == "item" and self.items is not None:
            days = pl.read_ipc(ctx.scratch / "days.arrow")
            asked = pl.concat([asked, spilled(ctx.scratch / "every-item", bucket).join(days, how="cross")])
        asked = asked.unique().sort(key, "as_of")
        blocks = spilled_blocks(ctx.scratch / side, bucket, rows=COUNTED_ROWS)
        frame = statistics_frame(blocks, asked, key=key, config=self.config)
        other = "item" if side == "user" else "user"
        empty = frame.clear()
        empty = empty.rename({key: f"{other}_id"}).cast({f"{other}_id": self._dtype(f"{other}_id", ctx)})
        tables = {f"{side}_features": frame, f"{other}_features": empty}
        return Part(frame=None, counts={f"{side}_rows": len(frame)}, tables=tables)

    def kind_of(self, shard: Shard) -> str:
        """Buckets of users make other rows than buckets of items."""
        return str(shard.extra["side"])

    def data_cutoff(self, ctx: Context) -> int | None:
        """Every row is strictly as of its own time: the log shapes no later one."""
        return None

    def _dtype(self, key: str, ctx: Context) -> pl.DataType:
        return ctx.table("events").scan([key]).collect_schema()[key]

    def _spill_asked(self, asked: Mapping[str, Spill], ctx: Context) -> pl.Series:
        """Bucket the (id, as_of) pairs to answer; returns the times at which an item is asked for."""
        time = (pl.col("timestamp") - pl.col("timestamp") % self.config.granularity).alias("as_of")
        wanted = "candidates" if "candidates" in ctx.table("requests").schema else "item_id"
        days = pl.Series("as_of", [], dtype=pl.Int64)
        for block in blocks_of_requests(ctx.table("requests"), ["user_id", "timestamp", wanted]):
            asked["user"].add(block.select("user_id", time).drop_nulls("user_id").unique())
            pairs = block.select(pl.col(wanted).alias("item_id"), time)
            pairs = (pairs.explode("item_id") if wanted == "candidates" else pairs).drop_nulls().unique()
            asked["item"].add(pairs)
            days = pl.concat([days, pairs["as_of"]]).unique()
        return days.sort()


def statistics_frame(
    blocks: Iterable[pl.DataFrame], asked: pl.DataFrame, *, key: str, config: FeatureConfig
) -> pl.DataFrame:
    """Statistics of every asked (id, as_of), one column a window and `recency_s`, all int64.

    Counts of blocks of events add up, and the latest of their latest is the latest: an id with a million
    events takes no more memory than one with many.
    """
    known = asked.select(pl.col(key).unique(maintain_order=True)).with_row_index("code")
    asked_codes = asked.select(key).join(known, on=key, how="left", maintain_order="left")["code"].to_numpy()
    days = day_of(asked["as_of"].to_numpy(), granularity=config.granularity)
    values = np.zeros((len(asked), len(config.windows) + 1), dtype=np.int64)
    values[:, -1] = -1
    for events in blocks:
        met = statistics(_past(events, known, key, config), asked_codes, days)
        recency = np.where(values[:, -1] < 0, met[:, -1], np.minimum(values[:, -1], met[:, -1]))
        values[:, -1] = np.where(met[:, -1] < 0, values[:, -1], recency)
        values[:, :-1] += met[:, :-1]
    names = statistic_names(config.windows)
    return asked.select(key, "as_of").with_columns(
        pl.Series(name, values[:, column]) for column, name in enumerate(names)
    )


def _past(events: pl.DataFrame, known: pl.DataFrame, key: str, config: FeatureConfig) -> PastCounts:
    """The events of those ids that are asked for."""
    codes = events.select(key).join(known, on=key, how="left", maintain_order="left")["code"]
    rows = codes.is_not_null()
    return PastCounts(
        codes.filter(rows).to_numpy(),
        events["timestamp"].filter(rows).to_numpy(),
        known_at(events, lag=config.lag).filter(rows).to_numpy(),
        windows=config.windows,
    )
