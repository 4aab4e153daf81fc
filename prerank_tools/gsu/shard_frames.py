"""Rows of a shard: requests and events of a bucket of users, bucketed once where they do not lie so."""

from __future__ import annotations

import numpy as np
import polars as pl

from prerank_tools.stage import Context, Shard
from prerank_tools.tables.bucketing import Bucketed, hash_ids
from prerank_tools.tables.contracts import split_rows
from prerank_tools.tables.events import ORDER, EventLog, bucket_requests, open_events
from prerank_tools.tables.spill import blocks_of, blocks_of_requests, spill, spilled


def log_of(ctx: Context) -> EventLog:
    """The behaviour log, opened once."""
    if "log" not in ctx.cache:
        ctx.cache["log"] = open_events(ctx.table("events"))
    log: EventLog = ctx.cache["log"]
    return log


def candidates_of(ctx: Context) -> int:
    """Candidates of all requests."""
    if "candidates" not in ctx.cache:
        table = ctx.table("requests")
        listed = "candidates" in table.schema
        ctx.cache["candidates"] = (
            table.scan(["candidates"]).select(pl.col("candidates").list.len().sum()).collect().item()
            if listed
            else table.rows
        )
    return int(ctx.cache["candidates"])


def bucket_rows(ctx: Context) -> None:
    """Bucket a log and requests that do not lie in buckets of users, on disk."""
    log = log_of(ctx)
    asked = bucket_requests(ctx.table("requests"), log.buckets)
    for role, source, blocks in (
        ("events", log.source, blocks_of(log.table, log.names())),
        ("requests", asked, blocks_of_requests(asked.table, _request_columns(ctx))),
    ):
        if not source.partitioned:
            somebody = (block.drop_nulls("user_id") for block in blocks)
            spill(somebody, ctx.scratch / role, by="user_id", buckets=source.buckets)


def events_of(shard: Shard, ctx: Context) -> pl.DataFrame:
    """Events of the shard's users, in the order of the files; without those that lack an id or a time."""
    log = log_of(ctx)
    return _read(log.source, "events", shard, log.names(), ctx).drop_nulls(ORDER)


def requests_of(shard: Shard, ctx: Context) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Requests of the shard's users, and the rows that cannot be used with the reason."""
    source, columns = bucket_requests(ctx.table("requests"), log_of(ctx).buckets), _request_columns(ctx)
    frame = _read(source, "requests", shard, columns, ctx)
    if shard.index == 0:
        # A row without a user is in no bucket; the first shard reports it.
        nobody = ctx.table("requests").scan(columns).filter(pl.col("user_id").is_null()).collect()
        frame = pl.concat([frame, nobody])
    good, bad = split_rows(frame, "requests")
    slice_N = hash_ids(good["user_id"]) // np.uint64(source.buckets) % np.uint64(shard.extra["slices"])
    mine = pl.Series(slice_N == shard.extra["slice"], dtype=pl.Boolean)
    return good.filter(mine), bad if shard.extra["slice"] == 0 else bad.clear()


def _read(source: Bucketed, role: str, shard: Shard, columns: list[str], ctx: Context) -> pl.DataFrame:
    runs, bucket = ctx.scratch / role, shard.extra["bucket"]  # no runs for a trial of few shards
    return spilled(runs, bucket) if runs.exists() else source.read(bucket, columns)


def _request_columns(ctx: Context) -> list[str]:
    column = "candidates" if "candidates" in ctx.table("requests").schema else "item_id"
    return ["request_id", "user_id", "timestamp", column]
