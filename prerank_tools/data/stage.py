"""The stages between a log and everything that learns from it: partition and split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import polars as pl

from prerank_tools.data.baskets import held_out
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.stage import Context, Part, Shard, Stage
from prerank_tools.tables.bucketing import bucket_of, default_buckets, layout, part_number
from prerank_tools.tables.contracts import split_rows
from prerank_tools.tables.events import ORDER, EventLog, open_events, sort_rows
from prerank_tools.tables.parquet import write_parquet
from prerank_tools.tables.partition import gather, gather_bad, memory_of, scatter
from prerank_tools.tables.table import Table

WEIGHED_ROWS, WEIGHED_BUCKETS = 1 << 18, 4  # that --dry-run sorts and writes to see what they weigh
ROW_NAME = {"events": "item_id", "requests": "request_id"}  # what tells rows of one user and time apart


@dataclass(frozen=True)
class Partition(Stage):
    """Rows in buckets of `by`, each sorted by (by, time): a first one, or one day more on an earlier one.

    A generation is one part a bucket. Appending links the parts of the earlier output and writes the new
    day's alone; readers merge. Rows from before the earlier output's end are late: their users are listed
    in the table `late_users`, since what was computed for them has changed.
    """

    rows: Path
    by: str = "user_id"
    buckets: int | None = None
    append_to: Path | None = None
    contract: str = "events"

    name: ClassVar[str] = "data.partition"
    tables: ClassVar[Mapping[str, str]] = {"late_users": ""}

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        """The new rows, and the output they are appended to."""
        earlier = {"earlier": (self.append_to, self.contract)} if self.append_to else {}
        return {"rows": (self.rows, self.contract), **earlier}

    def params(self) -> Mapping[str, Any]:
        """Column and number of buckets."""
        return {"by": self.by, "buckets": self.buckets, "contract": self.contract}

    def check(self, ctx: Context) -> None:
        """Refuse an unknown column, an earlier output of another kind, a day that is already in it."""
        table = ctx.table("rows")
        if self.by not in table.schema:
            raise ContractError(f"{table.path}: no column `{self.by}`", f"it has {', '.join(table.schema)}")
        if self.append_to is None:
            return
        earlier = ctx.table("earlier")
        found = layout(earlier)
        if found is None or found[0] != self.by or self.buckets not in (None, found[1]):
            raise ContractError(
                f"{earlier.path}: lies in {f'{found[1]} buckets of {found[0]}' if found else 'no buckets'}",
                "append with the --by and --buckets it was made with",
            )
        if _schema(earlier) != _schema(table):
            raise ContractError(
                f"{table.path}: its columns are {_named(_schema(table))}, those of {earlier.path} are "
                f"{_named(_schema(earlier))}",
                "write the day with the columns of the log it is appended to",
            )
        days = {day["digest"] for day in _generations(table)} or {table.digest}
        if days & {day["digest"] for day in _generations(earlier)}:
            raise ContractError(f"{table.path}: is in {earlier.path} already", "append each day once")

    def plan(self, ctx: Context) -> Sequence[Shard]:
        """One shard a bucket for the new rows, numbered after the earlier parts; shard 0 links those."""
        rows, buckets = ctx.table("rows").rows, self._buckets(ctx)
        earlier = ctx.table("earlier") if self.append_to else None
        first = 1 + max(map(part_number, earlier.parts)) if earlier else 0
        share = [rows // buckets + (bucket < rows % buckets) for bucket in range(buckets)]
        new = [Shard(first + n, "", 0, share[n], {"bucket": n}) for n in range(buckets)]
        return [Shard(0, "", 0, earlier.rows, {"earlier": True}), *new] if earlier else new

    def prepare(self, ctx: Context) -> None:
        """Scatter the new rows into runs on the output's filesystem."""
        scatter(ctx.table("rows"), ctx.scratch / "runs", by=self.by, buckets=self._buckets(ctx))

    def process(self, shard: Shard, ctx: Context) -> Part:
        """Link the earlier parts, or gather one bucket of the new rows."""
        if shard.extra.get("earlier"):
            return Part(None, linked=_published(ctx.table("earlier")), counts={"rows_in": shard.rows})
        bucket, runs = shard.extra["bucket"], ctx.scratch / "runs"
        frame = gather(runs, bucket, order=(self.by, "timestamp", ROW_NAME[self.contract]))
        bad = gather_bad(runs) if bucket == 0 else None
        late = _late_users(frame, self.by, ctx.table("earlier").data_cutoff if self.append_to else None)
        counts: dict[str, int | float] = {
            "rows_in": len(frame) + (0 if bad is None else len(bad)),
            "rows_appended": len(frame),
            "late_rows": int(late["rows"].sum()),
            "late_users": len(late),
        }
        # An empty part a bucket would double the files for nothing; one keeps the table readable.
        tables = {"late_users": late} if len(late) or bucket == 0 else {}
        return Part(frame, quarantine=bad, counts=counts, tables=tables)

    def quality(self, counts: Mapping[str, float], ctx: Context) -> Mapping[str, Any]:
        """How the parts lie, and which rows came in which generation."""
        table = ctx.table("rows")
        # A log that was partitioned before keeps the list of what is in it: compacting forgets no day.
        new = _generations(table) or [{"digest": table.digest, "rows": int(counts["rows_appended"])}]
        old = _generations(ctx.table("earlier")) if self.append_to else []
        return {
            "layout": {"by": self.by, "buckets": self._buckets(ctx)},
            "generations": [*old, *new],
        }

    def data_cutoff(self, ctx: Context) -> int | None:
        """The latest event of the new rows and of the earlier output."""
        times = [_latest(ctx.table("rows").scan(["timestamp"])), super().data_cutoff(ctx)]
        return max((time for time in times if time is not None), default=None)

    def estimate(self, ctx: Context, shards: Sequence[Shard]) -> Mapping[str, Any]:
        """Rows in all, bytes of the new parts (some are weighed), memory of one run or the largest bucket."""
        table = ctx.table("rows")
        return {
            "rows_out": sum(shard.rows for shard in shards),
            "bytes_out": self._weight(ctx),
            "memory_bytes": memory_of(table, by=self.by, buckets=self._buckets(ctx)),
        }

    def _weight(self, ctx: Context) -> int:
        """Bytes of the new parts, from the first rows of some buckets."""
        table, buckets = ctx.table("rows"), self._buckets(ctx)
        head = table.scan().head(WEIGHED_ROWS).drop_nulls(self.by).collect()
        bucket_N, some = bucket_of(head[self.by], buckets), min(buckets, WEIGHED_BUCKETS)
        watermark, size = ctx.table("earlier").data_cutoff if self.append_to else None, 0
        with TemporaryDirectory(prefix="prerank-") as folder:
            for bucket in range(some):
                frame = sort_rows(head.filter(bucket_N == bucket), (self.by, "timestamp"))
                late = _late_users(frame, self.by, watermark)
                for made, contract in ((frame, self.contract), (late, "")):
                    if len(made) or contract:
                        path = Path(folder) / "part.parquet"
                        write_parquet(made, path, contract=contract, compression=self.compression)
                        size += path.stat().st_size
        return round(size * buckets / some * table.rows / max(len(head), 1))

    @property
    def output(self) -> str:  # type: ignore[override]
        """What goes in comes out."""
        return self.contract

    @property
    def folder_only(self) -> bool:
        """A partition is its files."""
        return True

    def _buckets(self, ctx: Context) -> int:
        found = layout(ctx.table("earlier")) if self.append_to else None
        return found[1] if found else self.buckets or default_buckets(ctx.table("rows").rows)


@dataclass(frozen=True)
class Split(Stage):
    """The log cut at a time by whole basket: `train` ends before it, `test` holds what reaches it."""

    events: Path
    at: int

    name: ClassVar[str] = "data.split"
    tables: ClassVar[Mapping[str, str]] = {"train": "events", "test": "events"}

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        """The log."""
        return {"events": (self.events, "events")}

    def params(self) -> Mapping[str, Any]:
        """The cut."""
        return {"at": self.at}

    def check(self, ctx: Context) -> None:
        """Refuse a cut outside the log: one half would be empty."""
        first, last = time_span(ctx.table("events"))
        if not first < self.at <= last:
            raise UsageError(
                f"--at {self.at} is outside {self.events}",
                f"its events lie from {show(first)} to {show(last)}",
            )

    def plan(self, ctx: Context) -> Sequence[Shard]:
        """One shard a bucket."""
        return open_events(ctx.table("events")).shards()

    def estimate(self, ctx: Context, shards: Sequence[Shard]) -> Mapping[str, Any]:
        """Every row goes to one half."""
        return {"rows_out": ctx.table("events").rows}

    def process(self, shard: Shard, ctx: Context) -> Part:
        """Cut one bucket of users."""
        log = open_events(ctx.table("events"))
        events, bad = events_and_faults(log, shard.extra["bucket"])
        basket_n, time_n = basket_codes(events), events["timestamp"].to_numpy()
        test_n = held_out(basket_n, time_n, at=self.at)
        across = np.unique(basket_n[test_n & (time_n < self.at)])
        counts: dict[str, int | float] = {
            "rows_in": len(events) + len(bad),
            "rows_train": int((~test_n).sum()),
            "rows_test": int(test_n.sum()),
            "baskets_test": len(np.unique(basket_n[test_n])),
            "baskets_across": len(across),
        }
        tables = {"train": events.filter(pl.Series(~test_n)), "test": events.filter(pl.Series(test_n))}
        return Part(frame=None, quarantine=bad, counts=counts, tables=tables)

    def quality(self, counts: Mapping[str, float], ctx: Context) -> Mapping[str, Any]:
        """Both halves keep the buckets of the log they were cut from."""
        log = open_events(ctx.table("events"))
        return {"layout": {"by": "user_id", "buckets": log.buckets}}

    def data_cutoff(self, ctx: Context) -> int | None:
        """The latest event of either half."""
        return _latest(ctx.table("events").scan(["timestamp"]))

    def table_cutoff(self, name: str, ctx: Context, cutoff: int | None) -> int | None:
        """`train` ends before the cut."""
        return _latest(pl.scan_parquet(sorted((ctx.work / name / "data").glob("part-*.parquet"))))


def events_and_faults(log: EventLog, bucket: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(sorted events, rows that break the contract) of one bucket; rows without a user count to bucket 0."""
    rows = log.source.read(bucket)
    if bucket == 0 and not log.source.partitioned:
        rows = pl.concat([rows, log.source.read(-1)])
    events, bad = split_rows(rows, "events")
    return sort_rows(events, ORDER), bad


def basket_codes(events: pl.DataFrame) -> np.ndarray:
    """Number of every event's basket, 0 .. B-1 in the order of the rows: its basket, else its session.

    Events with neither make one basket of what a user did at one time.
    """
    # With its column in front, so that basket 7 and session 7 are two.
    named = [
        pl.format(f"{name} {{}}", name) for name in ("basket_id", "session_id") if name in events.columns
    ]
    basket = pl.coalesce(*named, pl.format("@{}", "timestamp"))
    first = pl.col("row").first().over("user_id", basket)
    first_n = events.with_row_index("row").select(first)["row"].to_numpy()
    return np.unique(first_n, return_inverse=True)[1].reshape(-1)


def time_span(table: Table) -> tuple[int, int]:
    """First and last `timestamp` of a table, epoch seconds."""
    time = pl.col("timestamp")
    first, last = table.scan(["timestamp"]).select(first=time.min(), last=time.max()).collect().row(0)
    if first is None:
        raise ContractError(f"{table.path}: no row has a timestamp", "write when each event happened")
    return int(first), int(last)


def show(time: int) -> str:
    """Epoch seconds with the date they stand for."""
    return f"{time} ({datetime.fromtimestamp(time, UTC):%Y-%m-%dT%H:%M:%S})"


def _late_users(rows: pl.DataFrame, by: str, watermark: int | None) -> pl.DataFrame:
    late = rows.filter(pl.col("timestamp") <= watermark) if watermark is not None else rows.clear()
    return late.group_by(by).agg(since=pl.col("timestamp").min(), rows=pl.len().cast(pl.Int64)).sort(by)


def _published(table: Table) -> list[dict[str, Any]]:
    """The manifest's entries of a table's parts, with the paths they have now."""
    parts = (table.manifest or {})["outputs"]["parts"]
    return [{**part, "path": str((table.path / part["path"]).absolute())} for part in parts]


def _generations(table: Table) -> list[dict[str, Any]]:
    """What was appended to a partitioned table, by digest and rows; none where it is not one."""
    return list((table.manifest or {}).get("quality", {}).get("generations", []))


def _schema(table: Table) -> dict[str, pl.DataType]:
    return dict(table.scan().collect_schema())


def _named(schema: Mapping[str, pl.DataType]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in schema.items())


def _latest(times: pl.LazyFrame) -> int | None:
    return times.select(pl.col("timestamp").max()).collect().item()
