"""All of a scorer's inputs together: tables in, packed request arrays out, one bucket of users at a time."""

# R requests, n candidates, F features
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.features.statistics import PastCounts, compress, day_of, statistic_names, statistics
from prerank_tools.gsu.simtier import TIERS
from prerank_tools.scorers import past_frames, request_frames
from prerank_tools.scorers.artefact import InputConfig
from prerank_tools.scorers.item_frames import Catalogue, read_catalogue, same_ids
from prerank_tools.scorers.packing import RequestArrays
from prerank_tools.scorers.request_frames import FlatRequests
from prerank_tools.stage import Context, Shard
from prerank_tools.tables.bucketing import default_buckets
from prerank_tools.tables.contracts import split_rows
from prerank_tools.tables.events import EventLog, bucket_requests, known_at, open_events

INLINE_EVENTS = 20_000_000  # item statistics of a longer log are computed once, by `data features`
CHUNK_CANDIDATES = 200_000  # candidates whose features are in memory together
BUCKET_REQUESTS = 4_096


@dataclass(frozen=True)
class InputPaths:
    """Where a scorer's inputs lie; what is None is computed here or left out."""

    requests: Path
    events: Path
    items: Path
    embeddings: Path
    users: Path | None = None
    sids: Path | None = None
    gsu: Path | None = None
    features: Path | None = None

    def roles(self) -> dict[str, tuple[Path, str]]:
        """Role -> (path, contract) of those that are given."""
        found = {
            "requests": (self.requests, "requests"),
            "events": (self.events, "events"),
            "items": (self.items, "items"),
            "embeddings": (self.embeddings, "item_embeddings"),
        }
        optional = {"users": "user_embeddings", "sids": "item_sids", "gsu": "gsu_topk"}
        found |= {
            role: (path, c) for role, c in optional.items() if (path := getattr(self, role)) is not None
        }
        if self.features is not None:
            for name in ("user_features", "item_features"):
                found[name] = (self.features / name, name)
        return found


# Fitted inputs: each carries the time up to which it has seen the log.
FITTED = ("embeddings", "users", "sids", "gsu", "user_features", "item_features", "model", "init_from")


@dataclass(frozen=True)
class Chunk:
    """Some requests of one bucket: their ids, and their inputs as arrays."""

    flat: FlatRequests
    arrays: RequestArrays
    counts: dict[str, int]


@dataclass(frozen=True)
class ScorerInputs:
    """Reads what `config` asks for from the tables of a running job."""

    ctx: Context
    config: InputConfig
    catalogue: Catalogue
    with_users: bool

    def bucket(self, number: int, *, tasks: tuple[str, ...], until: int | None = None) -> Iterator[Chunk]:
        """The requests of one bucket of users in chunks, with what was known strictly before each."""
        log, requests = event_log(self.ctx), self.ctx.table("requests")
        frame = bucket_requests(requests, log.buckets).read(number, request_frames.columns_of(requests))
        frame, _ = split_rows(frame, "requests")
        if until is not None:
            frame = frame.filter(pl.col("timestamp") < until)
        if not len(frame):
            return
        past = past_frames.read_past(log.read(number, []), self.catalogue, lag=self.config.lag)
        for part in _chunks(request_frames.flatten(frame, source=str(requests.path))):
            yield self._arrays(part, past, tasks)

    def refused(self, number: int) -> tuple[pl.DataFrame, int]:
        """Requests of a bucket that cannot be used, with the reason, and how many rows the bucket has."""
        log, requests = event_log(self.ctx), self.ctx.table("requests")
        frame = bucket_requests(requests, log.buckets).read(number, request_frames.columns_of(requests))
        return split_rows(frame, "requests")[1], len(frame)

    def user_blocks(self) -> dict[str, int]:
        """Widths of the user tower's inputs."""
        blocks = {"context": past_frames.CONTEXT_WIDTH}
        if self.config.history:
            blocks["history"] = self.catalogue.content_ND.shape[1]
        if self.with_users:
            blocks |= {"vector": vector_width(self.ctx, "users"), "has_vector": 1}
        return blocks

    def cross_blocks(self, past_width: int) -> dict[str, int]:
        """Widths of the cross tower's inputs."""
        width = len(statistic_names())
        blocks = {"user_statistics": width, "item_statistics": width, "crosses": past_width}
        return blocks | ({"simtier": 2 * TIERS + 1} if self.config.simtier else {})

    def _arrays(self, flat: FlatRequests, past: past_frames.Past, tasks: tuple[str, ...]) -> Chunk:
        user_R, time_R = past.user_codes(flat.requests["user_id"]), flat.requests["timestamp"].to_numpy()
        seen_R, item_n = past.visible(user_R, time_R), self.catalogue.rows(flat.candidates["item_id"])
        request_n = flat.request_n
        user_RF = self._user_side(flat, past, user_R, seen_R)
        cross = [
            compress(self._user_statistics(flat, past, user_R))[request_n],
            compress(self._item_statistics(flat, item_n)),
            past_frames.cross_features(past, self.catalogue, user_R[request_n], item_n, time_R[request_n]),
        ]
        if self.config.simtier:
            cross.append(self._simtier(flat, past))
        arrays = RequestArrays(
            user_RF=user_RF,
            offset_R=flat.offset_R,
            item_n=item_n,
            cross_nF=np.concatenate(cross, axis=1).astype(np.float32),
            label_nK=request_frames.labels_of(flat, tasks),
        )
        return Chunk(flat, arrays, self._counts(flat, user_RF, seen_R, item_n))

    def _counts(
        self, flat: FlatRequests, user_RF: np.ndarray, seen_R: np.ndarray, item_n: np.ndarray
    ) -> dict[str, int]:
        counts = {
            "requests": len(flat.requests),
            "candidates": len(item_n),
            "unknown_items": int((item_n == len(self.catalogue.ids)).sum()),
            "without_vector": int((~self.catalogue.has_vector[item_n]).sum()),
            "empty_histories": int((seen_R == 0).sum()),
        }
        return counts | ({"cold_users": int((user_RF[:, -1] == 0).sum())} if self.with_users else {})

    def _user_side(
        self, flat: FlatRequests, past: past_frames.Past, user_R: np.ndarray, seen_R: np.ndarray
    ) -> np.ndarray:
        blocks = [past_frames.context(flat.requests["timestamp"].to_numpy(), seen_R)]
        if self.config.history:
            blocks.append(
                past_frames.mean_history(past, self.catalogue, user_R, seen_R, newest=self.config.history)
            )
        if self.with_users:
            blocks.append(past_frames.user_vectors(self._users_of(flat.requests), flat.requests))
        return np.concatenate(blocks, axis=1)

    def _users_of(self, requests: pl.DataFrame) -> pl.DataFrame:
        """Rows of the user embeddings of these users; a small table is read once."""
        users, columns = self.ctx.table("users"), ["user_id", "as_of", "embedding"]
        if users.rows > 1_000_000:
            wanted = requests["user_id"].unique()
            return users.scan(columns).filter(pl.col("user_id").is_in(wanted.implode())).collect()
        return _cached(self.ctx, "users", lambda: users.read(columns))

    def _user_statistics(self, flat: FlatRequests, past: past_frames.Past, user_R: np.ndarray) -> np.ndarray:
        if "user_features" not in self.ctx.inputs:
            return past_frames.user_statistics(past, user_R, flat.requests["timestamp"].to_numpy())
        stored = _features(self.ctx, "user")
        return past_frames.stored_statistics(stored, flat.requests, key="user_id")

    def _item_statistics(self, flat: FlatRequests, item_n: np.ndarray) -> np.ndarray:
        time_n = flat.requests["timestamp"].to_numpy()[flat.request_n]
        if "item_features" in self.ctx.inputs:
            asked = flat.candidates.select("item_id").with_columns(pl.Series("timestamp", time_n))
            return past_frames.stored_statistics(_features(self.ctx, "item"), asked, key="item_id")
        counts = _cached(self.ctx, "item_counts", lambda: _item_counts(self.ctx, self.catalogue, self.config))
        known_n = np.where(item_n < len(self.catalogue.ids), item_n, -1)
        return statistics(counts, known_n, day_of(time_n))

    def _simtier(self, flat: FlatRequests, past: past_frames.Past) -> np.ndarray:
        if "gsu" in self.ctx.inputs:
            columns = ["request_id", "item_id", "n_valid", "simtier", "simtier_recent"]
            gsu = _cached(self.ctx, "gsu", lambda: self.ctx.table("gsu").read(columns))
            return past_frames.stored_simtier(gsu, flat.candidates)
        return past_frames.simtier_features(
            past,
            self.catalogue,
            flat,
            k=self.config.gsu_k,
            lag=self.config.lag,
            threads=self.ctx.threads,
            device=self.ctx.device,
        )


def open_scorer_inputs(
    ctx: Context,
    config: InputConfig,
    *,
    vocabularies: Mapping[str, tuple[str, ...]],
    with_users: bool,
    with_sids: bool,
) -> ScorerInputs:
    """Read the static side once a process and make the reader of requests."""
    catalogue = _cached(
        ctx,
        "catalogue",
        lambda: read_catalogue(
            ctx.table("items"),
            ctx.table("embeddings"),
            sids=ctx.table("sids") if with_sids else None,
            numbers=config.numbers,
            vocabularies=vocabularies,
        ),
    )
    return ScorerInputs(ctx, config, catalogue, with_users)


def event_log(ctx: Context) -> EventLog:
    """The log in its own buckets; a small one in as many as its rows and the requests ask for."""
    table, requests = ctx.table("events"), ctx.table("requests")
    wanted = max(default_buckets(table.rows), default_buckets(requests.rows, bucket_rows=BUCKET_REQUESTS))
    log = open_events(table)
    return log if log.source.partitioned else open_events(table, buckets=wanted)


def bucket_shards(ctx: Context) -> list[Shard]:
    """One shard a bucket of users."""
    log = event_log(ctx)
    rows = bucket_requests(ctx.table("requests"), log.buckets).bucket_rows()
    return [
        Shard(bucket, str(ctx.table("requests").path), 0, rows[bucket], {"bucket": bucket})
        for bucket in range(log.buckets)
    ]


def check_inputs(ctx: Context, config: InputConfig) -> None:
    """Refuse ids that never meet, columns that are not there, and a log too long to count anew each time."""
    requests, items, events = ctx.table("requests"), ctx.table("items"), ctx.table("events")
    candidates = "candidates" if "candidates" in requests.schema else "item_id"
    same_ids(requests, items, "item_id", inner=candidates)
    same_ids(events, items, "item_id")
    same_ids(events, requests, "user_id")
    same_ids(ctx.table("embeddings"), items, "item_id")
    for column in config.numbers:
        if column not in items.schema:
            raise ContractError(
                f"{items.path}: no column `{column}`", "name numeric columns in `inputs.numbers`"
            )
    if "item_features" not in ctx.inputs and events.rows > INLINE_EVENTS:
        raise UsageError(
            f"{events.path}: {events.rows} events are too many to count anew in every job",
            f"prerank data features --events {events.path} --requests {requests.path} -o features/, "
            "then --features features/",
        )
    if "gsu" in ctx.inputs and not {"simtier", "simtier_recent"} <= set(ctx.table("gsu").schema):
        raise ContractError(
            f"{ctx.table('gsu').path}: no columns `simtier` and `simtier_recent`",
            "prerank gsu topk ... --emit both",
        )
    for side in ("user", "item"):
        if f"{side}_features" in ctx.inputs:
            _check_features(ctx.table(f"{side}_features").schema, ctx.table(f"{side}_features").path)


def check_cutoffs(ctx: Context, start: int, *, what: str) -> None:
    """Refuse inputs that were fitted on events later than `start`: they would have seen the answers."""
    for role in FITTED:
        if role not in ctx.inputs:
            continue
        cutoff = ctx.inputs[role].data_cutoff
        if cutoff is not None and cutoff > start:
            raise ContractError(
                f"{ctx.inputs[role].path}: {role} has seen events up to {cutoff}, {what} starts at {start}",
                f"fit it again with --until {start}",
            )


def vector_width(ctx: Context, role: str) -> int:
    """Dims of a table's vectors."""
    dtype = ctx.table(role).scan(["embedding"]).collect_schema()["embedding"]
    assert isinstance(dtype, pl.Array)
    return dtype.size


def _item_counts(ctx: Context, catalogue: Catalogue, config: InputConfig) -> PastCounts:
    """Past counts of every item over the whole log."""
    events = ctx.table("events")
    late = ["ingested_at"] if "ingested_at" in events.schema else []
    frame = events.scan(["item_id", "timestamp", *late]).collect().drop_nulls(["item_id", "timestamp"])
    rows_E = catalogue.rows(frame["item_id"])
    known_E = known_at(frame, lag=config.lag).to_numpy()
    return PastCounts(rows_E, frame["timestamp"].to_numpy(), known_E)


def _features(ctx: Context, side: str) -> pl.DataFrame:
    columns = [f"{side}_id", "as_of", *statistic_names()]
    return _cached(ctx, f"{side}_features", lambda: ctx.table(f"{side}_features").read(columns))


def _check_features(schema: pl.Schema, path: Path) -> None:
    for name in statistic_names():
        if name not in schema:
            raise ContractError(
                f"{path}: no column `{name}`; it has {', '.join(schema)}",
                "write it with the default windows: prerank data features",
            )


def _chunks(flat: FlatRequests) -> Iterator[FlatRequests]:
    """Whole requests, about `CHUNK_CANDIDATES` candidates together."""
    start, total = 0, len(flat.requests)
    while start < total:
        limit = flat.offset_R[start] + CHUNK_CANDIDATES
        stop = max(start + 1, int(np.searchsorted(flat.offset_R, limit, side="right")) - 1)
        first, last = int(flat.offset_R[start]), int(flat.offset_R[stop])
        yield FlatRequests(
            requests=flat.requests[start:stop],
            candidates=flat.candidates[first:last],
            offset_R=flat.offset_R[start : stop + 1] - first,
        )
        start = stop


def _cached(ctx: Context, key: str, make: Any) -> Any:
    name = f"scorer:{key}"
    if name not in ctx.cache:
        ctx.cache[name] = make()
    return ctx.cache[name]
