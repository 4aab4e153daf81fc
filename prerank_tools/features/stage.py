"""`data features`: point-in-time statistics of every user and item that the requests name, day by day."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from prerank_tools.features.statistics import DAY, WINDOWS, PastCounts, day_of, statistic_names, statistics
from prerank_tools.stage import Context, Part, Shard, Stage
from prerank_tools.tables.bucketing import Bucketed, bucket_of, default_buckets
from prerank_tools.tables.events import known_at
from prerank_tools.tables.table import Table


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
        buckets = default_buckets(ctx.table("events").rows, bucket_rows=1 << 20)
        rows = ctx.table("events").rows // buckets
        return [
            Shard(
                index, str(self.events), rows=rows, extra={"side": side, "bucket": bucket, "buckets": buckets}
            )
            for index, (side, bucket) in enumerate((s, b) for s in ("user", "item") for b in range(buckets))
        ]

    def process(self, shard: Shard, ctx: Context) -> Part:
        """Statistics of one bucket of users or of items."""
        side, bucket, buckets = (shard.extra[key] for key in ("side", "bucket", "buckets"))
        key = f"{side}_id"
        asked = self._asked(side, ctx).filter(pl.col(key).is_not_null())
        asked = asked.filter(bucket_of(asked[key], buckets) == bucket).unique().sort(key, "as_of")
        events = read_bucket(ctx.table("events"), key, bucket, buckets)
        frame = statistics_frame(events, asked, key=key, config=self.config)
        other = "item" if side == "user" else "user"
        empty = statistics_frame(events.clear(), asked.clear(), key=key, config=self.config)
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

    def _asked(self, side: str, ctx: Context) -> pl.DataFrame:
        """The (id, as_of) pairs to answer."""
        requests = ctx.table("requests")
        time = (pl.col("timestamp") - pl.col("timestamp") % self.config.granularity).alias("as_of")
        if side == "user":
            return requests.scan(["user_id", "timestamp"]).select("user_id", time).unique().collect()
        if "candidates" in requests.schema:
            wanted = requests.scan(["candidates", "timestamp"]).select(
                pl.col("candidates").alias("item_id"), time
            )
            pairs = wanted.explode("item_id")
        else:
            pairs = requests.scan(["item_id", "timestamp"]).select("item_id", time)
        asked = pairs.drop_nulls().unique().collect()
        if self.items is None:
            return asked
        every = ctx.table("items").scan(["item_id"]).join(asked.lazy().select("as_of").unique(), how="cross")
        return pl.concat([asked, every.collect()]).unique()


def read_bucket(events: Table, key: str, bucket: int, buckets: int) -> pl.DataFrame:
    """Events of the ids in one bucket: id, timestamp and when the event was ingested."""
    late = ["ingested_at"] if "ingested_at" in events.schema else []
    source = Bucketed(events, key, buckets, partitioned=False)
    return source.read(bucket, [key, "timestamp", *late]).drop_nulls([key, "timestamp"])


def statistics_frame(
    events: pl.DataFrame, asked: pl.DataFrame, *, key: str, config: FeatureConfig
) -> pl.DataFrame:
    """Statistics of every asked (id, as_of), one column a window and `recency_s`, all int64."""
    known = asked.select(pl.col(key).unique(maintain_order=True)).with_row_index("code")
    codes = events.select(key).join(known, on=key, how="left", maintain_order="left")["code"]
    rows = codes.is_not_null()
    past = PastCounts(
        codes.filter(rows).to_numpy(),
        events["timestamp"].filter(rows).to_numpy(),
        known_at(events, lag=config.lag).filter(rows).to_numpy(),
        windows=config.windows,
    )
    asked_codes = asked.select(key).join(known, on=key, how="left", maintain_order="left")["code"].to_numpy()
    values = statistics(past, asked_codes, day_of(asked["as_of"].to_numpy(), granularity=config.granularity))
    names = statistic_names(config.windows)
    return asked.select(key, "as_of").with_columns(
        pl.Series(name, values[:, column]) for column, name in enumerate(names)
    )
