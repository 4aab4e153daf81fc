"""All of a scorer's inputs together: tables in, packed request arrays out, one bucket of users at a time."""

# R requests, n candidates, F features
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prerank_tools.features.statistics import PastCounts, compress, day_of, statistic_names, statistics
from prerank_tools.gsu.simtier import TIERS
from prerank_tools.scorers import past_frames, request_frames
from prerank_tools.scorers.artefact import InputConfig
from prerank_tools.scorers.item_frames import Catalogue, read_catalogue
from prerank_tools.scorers.packing import RequestArrays
from prerank_tools.scorers.request_frames import FlatRequests
from prerank_tools.stage import Context, Shard
from prerank_tools.tables.bucketing import default_buckets
from prerank_tools.tables.contracts import split_rows
from prerank_tools.tables.events import EventLog, bucket_requests, known_at, open_events

CHUNK_CANDIDATES = 200_000  # candidates whose features are in memory together
BUCKET_REQUESTS = 4_096
HELD_ROWS = 1_000_000  # a table of more rows is filtered while it is read


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

    def requests(self, bucket: int) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Requests of one bucket of users: those that can be used, and the others with the reason."""
        requests = self.ctx.table("requests")
        source = bucket_requests(requests, event_log(self.ctx).buckets)
        return split_rows(source.read(bucket, request_frames.columns_of(requests)), "requests")

    def chunks(self, requests: pl.DataFrame, *, bucket: int, tasks: tuple[str, ...]) -> Iterator[Chunk]:
        """Requests of one bucket, some at a time, with what was known strictly before each."""
        if not len(requests):
            return
        events = event_log(self.ctx).read(bucket, [])
        past = past_frames.read_past(events, self.catalogue, lag=self.config.lag)
        for part in _chunks(request_frames.flatten(requests, source=str(self.ctx.table("requests").path))):
            yield self._arrays(part, past, tasks)

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
            vectors = _rows_of(self.ctx, "users", ["as_of", "embedding"], flat.requests.select("user_id"))
            blocks.append(past_frames.user_vectors(vectors, flat.requests))
        return np.concatenate(blocks, axis=1)

    def _user_statistics(self, flat: FlatRequests, past: past_frames.Past, user_R: np.ndarray) -> np.ndarray:
        if "user_features" not in self.ctx.inputs:
            return past_frames.user_statistics(past, user_R, flat.requests["timestamp"].to_numpy())
        columns = ["as_of", *statistic_names()]
        stored = _rows_of(self.ctx, "user_features", columns, flat.requests.select("user_id"))
        return past_frames.stored_statistics(stored, flat.requests, key="user_id")

    def _item_statistics(self, flat: FlatRequests, item_n: np.ndarray) -> np.ndarray:
        time_n = flat.requests["timestamp"].to_numpy()[flat.request_n]
        if "item_features" in self.ctx.inputs:
            asked = flat.candidates.select("item_id").with_columns(pl.Series("timestamp", time_n))
            columns = ["as_of", *statistic_names()]
            stored = _rows_of(self.ctx, "item_features", columns, asked.select("item_id"))
            return past_frames.stored_statistics(stored, asked, key="item_id")
        counts = _cached(self.ctx, "item_counts", lambda: _item_counts(self.ctx, self.catalogue, self.config))
        known_n = np.where(item_n < len(self.catalogue.ids), item_n, -1)
        return statistics(counts, known_n, day_of(time_n))

    def _simtier(self, flat: FlatRequests, past: past_frames.Past) -> np.ndarray:
        if "gsu" in self.ctx.inputs:
            columns = ["n_valid", "simtier", "simtier_recent"]
            keys = flat.candidates.select("request_id", "item_id")
            return past_frames.stored_simtier(_rows_of(self.ctx, "gsu", columns, keys), keys)
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


def _rows_of(ctx: Context, role: str, columns: list[str], keys: pl.DataFrame) -> pl.DataFrame:
    """Rows of a table with one of the keys; a small table is held, a large one filtered as it is read."""
    table, names = ctx.table(role), [*keys.columns, *columns]
    small = table.rows <= HELD_ROWS
    rows = _cached(ctx, role, lambda: table.read(names)).lazy() if small else table.scan(names)
    return rows.join(keys.unique().lazy(), on=keys.columns, how="semi", maintain_order="left").collect()


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
