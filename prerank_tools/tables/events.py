"""Read the behaviour log by buckets of users, sorted, as of a time.

log = open_events(table)                      # partitioned, or small enough to bucket while reading
for shard in log.shards(): ...                # one a bucket; shard.extra["bucket"]
events = log.read(bucket, ["item_id"], until=T)
requests = bucket_requests(requests_table, log.buckets).read(bucket)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from prerank_tools.stage import Shard
from prerank_tools.tables.bucketing import Bucketed, bucketed
from prerank_tools.tables.table import Table

ORDER = ("user_id", "timestamp", "item_id")


@dataclass(frozen=True)
class EventLog:
    """The log by buckets of users: all events of a user are in one bucket."""

    source: Bucketed

    @property
    def buckets(self) -> int:
        """Number of buckets; read requests in the same number."""
        return self.source.buckets

    @property
    def table(self) -> Table:
        """The table the log is read from."""
        return self.source.table

    def shards(self) -> list[Shard]:
        """One shard a bucket, with its rows; `extra["bucket"]` is what `read` takes."""
        return self.source.shards()

    def read(
        self, bucket: int, columns: Sequence[str] | None = None, *, until: int | None = None, lag: int = 0
    ) -> pl.DataFrame:
        """Events of one bucket in the order (user, time, item), as of `until` where it is given.

        user_id, timestamp and item_id always come along, and `ingested_at` where the log has it.
        Rows without an id or a time are left out: `data partition` counts and names them.
        """
        frame = self._whole(bucket, columns)
        if until is not None:
            frame = as_of(frame, until, lag=lag)
        frame = frame.drop_nulls(ORDER)
        if not self.source.partitioned or len(self.source.parts_of(bucket)) > 1:
            frame = sort_rows(frame, ORDER)
        return frame if columns is None else frame.select(self.names(columns))

    def _whole(self, bucket: int, columns: Sequence[str] | None) -> pl.DataFrame:
        # Rows that agree in the sort key are told apart by the other columns: when parts are to be merged,
        # all columns are needed for an order that does not depend on the night a row came in.
        merged = not self.source.partitioned or len(self.source.parts_of(bucket)) > 1
        return self.source.read(bucket, None if merged or columns is None else self.names(columns))

    def names(self, columns: Sequence[str] = ()) -> list[str]:
        """`columns` after those that always come along."""
        late = ["ingested_at"] if "ingested_at" in self.table.schema else []
        return list(dict.fromkeys([*ORDER, *late, *columns]))


def open_events(table: Table, *, buckets: int | None = None) -> EventLog:
    """The log in its own buckets, or a small one in `buckets` made while reading; a large one is refused."""
    return EventLog(bucketed(table, by="user_id", buckets=buckets))


def bucket_requests(table: Table, buckets: int) -> Bucketed:
    """Requests (or any table with `user_id`) by the same buckets of users as the log."""
    return bucketed(table, by="user_id", buckets=buckets)


def as_of(events: pl.DataFrame, time: int, *, lag: int = 0) -> pl.DataFrame:
    """What was known at `time`: `timestamp < time` and, where it exists, `ingested_at < time - lag`."""
    return events.filter(known_at(events, lag=lag) < time)


def known_at(events: pl.DataFrame, *, lag: int = 0) -> pl.Series:
    """The time after which an event is known, `int64`: an event takes part as of T where this is below T."""
    if "ingested_at" not in events.columns:
        return events["timestamp"]
    return events.select(
        pl.max_horizontal("timestamp", pl.col("ingested_at") + lag).alias("timestamp")
    ).to_series()


def sort_rows(frame: pl.DataFrame, key: Sequence[str]) -> pl.DataFrame:
    """Sort by `key`, then by every other column that has an order: equal rows in, equal rows out."""
    rest = [
        name
        for name, dtype in frame.schema.items()
        if name not in key and not isinstance(dtype, (pl.List, pl.Array, pl.Struct))
    ]
    return frame.sort([*key, *rest])
