"""`embed users`: a behaviour log as of a time in, one vector a user out; only changes are computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.stage import Context, Part, Shard, Stage, Trial
from prerank_tools.tables.bucketing import Bucketed, bucketed
from prerank_tools.tables.events import EventLog, bucket_requests, open_events
from prerank_tools.tables.table import Table
from prerank_tools.tables.vectors import numpy_to_vectors, vectors_to_numpy
from prerank_tools.users import artefact, histories
from prerank_tools.users.artefact import UserModelSpec
from prerank_tools.users.batches import fixed_shapes, pad
from prerank_tools.users.frames import check_ids, columns_of, log_of, same_encoder, width_of
from prerank_tools.users.histories import Catalogue, Histories, Log
from prerank_tools.users.llatte import UserModel
from prerank_tools.users.tokens import Events

DAY = 86_400
BATCH_TOKENS = 8192  # events of a batch; another number can change the last bits
COLUMNS = ["user_id", "as_of", "embedding", "n_events", "model_version", "history_hash"]


@dataclass(frozen=True)
class EmbedUsers(Stage):
    """One row for each user and as-of time with at least one event known before it.

    The times are `as_of`, for every user of the log, or the days of the users' `requests`. A cold user has no
    row and is counted: who joins as of a time finds none, and says so with a flag. With `previous`, a user
    whose history reads the same as then keeps the vector; the table is the one a full run writes.
    """

    name: ClassVar[str] = "embed.users"
    output: ClassVar[str] = "user_embeddings"
    sort_key: ClassVar[tuple[str, ...]] = ("user_id", "as_of")
    compression: ClassVar[Literal["zstd", "uncompressed"]] = "uncompressed"

    events: Path
    embeddings: Path
    model: Path
    as_of: tuple[int, ...] = ()
    requests: Path | None = None
    previous: Path | None = None
    erased: Path | None = None

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        found = {
            "events": (self.events, "events"),
            "embeddings": (self.embeddings, "item_embeddings"),
            "model": (self.model, ""),
        }
        more = {
            "requests": (self.requests, "requests"),
            "previous": (self.previous, "user_embeddings"),
            "erased": (self.erased, ""),
        }
        return found | {role: (path, contract) for role, (path, contract) in more.items() if path}

    def params(self) -> Mapping[str, Any]:
        return {"as_of": sorted(set(self.as_of))}

    def check(self, ctx: Context) -> None:
        if bool(self.as_of) == (self.requests is not None):
            raise UsageError(
                "embed users needs the times to embed at", "give --as-of TIME, or --requests r.parquet"
            )
        check_ids(ctx.table("events"), ctx.table("embeddings"))
        spec = artefact.read_spec(self.model)
        width = width_of(ctx.table("embeddings"))
        if width != spec.content:
            raise ContractError(
                f"{self.embeddings}: {width} dims, {self.model} was trained on {spec.content}",
                "embed the items with the encoder of that model, or train the user model again",
            )
        same_encoder(ctx.inputs["model"].lineage, ctx.inputs["embeddings"].lineage, self.embeddings)
        self._check_previous(ctx)

    def _check_previous(self, ctx: Context) -> None:
        if self.previous is None:
            return
        ours, theirs = artefact.fingerprint(self.model), ctx.inputs["previous"].lineage.get("user_model")
        if theirs != ours:
            raise ContractError(
                f"{self.previous}: made by user model {str(theirs)[:12]}, not by {ours[:12]}",
                "name the model of that table, or leave --previous out to compute every user",
            )

    def plan(self, ctx: Context) -> Sequence[Shard]:
        return _log(ctx).shards()

    def trials(self, ctx: Context, shards: Sequence[Shard]) -> Sequence[Trial]:
        """Buckets hold about as many users each, whatever their events."""
        trials = super().trials(ctx, shards)
        if len(trials) == len(shards):
            return trials
        return [replace(trial, times=len(shards) if trial.times else 0) for trial in trials]

    def process(self, shard: Shard, ctx: Context) -> Part:
        bucket = int(shard.extra["bucket"])
        spec, model = _model(self.model, ctx)
        frame = self._events(bucket, ctx)
        log, catalogue, users = log_of(frame, spec, ctx.table("embeddings"), ctx.cache)
        asked = self._wanted(users, bucket, ctx)
        wanted = asked.drop_nulls("user")
        known = histories.as_of(
            log, wanted["user"].to_numpy(), wanted["as_of"].to_numpy(), limit=spec.max_events
        )
        kept = np.flatnonzero(known.count_S > 0)
        known, cold = known.take(kept), len(asked) - len(kept)
        hash_S = histories.digest(log, catalogue, known)
        rows = wanted[kept].select("user_id", "as_of").with_columns(history_hash=pl.Series(hash_S))
        old_S, x_SD = self._previous(rows, spec.width, bucket, ctx)
        new = np.flatnonzero(old_S < 0)
        x_SD[new] = embed(model, log, catalogue, known.take(new), device=ctx.device)
        frame = rows.with_columns(
            numpy_to_vectors("embedding", x_SD),
            pl.Series("n_events", known.count_S),
            pl.lit(ctx.cache["model_version"]).alias("model_version"),
        )
        counts = {
            "events": len(log.user_N),
            "events_without_vector": int(np.count_nonzero(catalogue.without_vector[log.item_N])),
            "computed": len(new),
            "reused": len(rows) - len(new),
            "cold": cold if self.requests else 0,
            "norm_sum": float(np.linalg.norm(x_SD.astype(np.float64), axis=1).sum()),
        }
        return Part(frame=frame.select(COLUMNS).sort(self.sort_key), counts=counts)

    def quality(self, counts: Mapping[str, float], ctx: Context) -> Mapping[str, Any]:
        rows = counts["computed"] + counts["reused"]
        return {
            "mean_norm": counts["norm_sum"] / max(rows, 1),
            "cold_share": counts["cold"] / max(rows + counts["cold"], 1),
            "reused_share": counts["reused"] / max(rows, 1),
        }

    def data_cutoff(self, ctx: Context) -> int | None:
        """Newest event used and whatever the model has seen; as of requests' own days the log is left out."""
        tables = {role: t for role, t in ctx.inputs.items() if role in ("embeddings", "model")}
        cutoffs = [table.data_cutoff for table in tables.values() if table.data_cutoff is not None]
        if self.as_of:
            cutoffs.append(_newest_before(ctx.table("events"), max(self.as_of)))
        return max(cutoffs, default=None)

    def lineage(self, ctx: Context) -> Mapping[str, str]:
        encoder = {k: v for k, v in ctx.inputs["embeddings"].lineage.items() if k == "encoder"}
        return {**ctx.inputs["model"].lineage, **encoder, "user_model": artefact.fingerprint(self.model)}

    def _events(self, bucket: int, ctx: Context) -> pl.DataFrame:
        """Events of a bucket that any of the times may see, without those of erased users."""
        log = _log(ctx)
        frame = log.read(bucket, columns_of(log.table), until=max(self.as_of) if self.as_of else None)
        if self.erased is None:
            return frame
        return frame.filter(~pl.col("user_id").is_in(_erased(self.erased, frame["user_id"].dtype).implode()))

    def _wanted(self, users: pl.Series, bucket: int, ctx: Context) -> pl.DataFrame:
        """user_id, as_of and user (its number in the log, null where unknown) of every row to make."""
        numbered = pl.DataFrame({"user_id": users, "user": np.arange(len(users))})
        if self.requests is None:
            times = pl.DataFrame({"as_of": sorted(set(self.as_of))}, schema={"as_of": pl.Int64})
            return numbered.join(times, how="cross").sort("user", "as_of")
        asked = bucket_requests(ctx.table("requests"), _log(ctx).buckets).read(
            bucket, ["user_id", "timestamp"]
        )
        days = asked.select("user_id", as_of=pl.col("timestamp") // DAY * DAY).unique()
        return days.join(numbered, on="user_id", how="left").sort("user_id", "as_of")

    def _previous(
        self, rows: pl.DataFrame, width: int, bucket: int, ctx: Context
    ) -> tuple[np.ndarray, np.ndarray]:
        """For every row its row of the previous table (-1: history changed) and (S, D) with those vectors."""
        x_SD = np.zeros((len(rows), width), dtype=np.float32)
        if self.previous is None:
            return np.full(len(rows), -1), x_SD
        columns = ["user_id", "history_hash", "embedding"]
        before = _by_user(ctx.table("previous"), _log(ctx).buckets).read(bucket, columns)
        before = before.unique(["user_id", "history_hash"], maintain_order=True).with_row_index("row")
        keys = before.select("user_id", "history_hash", pl.col("row").cast(pl.Int64))
        joined = rows.join(keys, on=["user_id", "history_hash"], how="left", maintain_order="left")
        old_S = joined["row"].fill_null(-1).to_numpy()
        x_SD[old_S >= 0] = vectors_to_numpy(before["embedding"])[old_S[old_S >= 0]]
        return old_S, x_SD


def embed(
    model: UserModel, log: Log, catalogue: Catalogue, known: Histories, *, device: str = "cpu"
) -> np.ndarray:
    """(S, D) float32 vectors of histories, in batches of fixed shapes: none depends on its neighbours."""
    config = model.config
    x_SD = np.zeros((len(known.rows), config.summaries * config.summary_width), dtype=np.float32)
    lengths = np.array([len(rows) for rows in known.rows], dtype=np.int64)
    with torch.inference_mode():
        for which, length, rows in fixed_shapes(lengths, tokens=BATCH_TOKENS):
            events = pad(log, catalogue, known.take(which), length=length, rows=rows)
            moved = Events(*(tensor.to(device) for tensor in events))
            x_SD[which] = model.embed(moved).float().cpu().numpy()[: len(which)]
    return x_SD


def _log(ctx: Context) -> EventLog:
    return open_events(ctx.table("events"))


def _model(folder: Path, ctx: Context) -> tuple[UserModelSpec, UserModel]:
    if "model" not in ctx.cache:
        ctx.cache["model"] = artefact.load(folder, device=ctx.device)
        ctx.cache["model_version"] = artefact.fingerprint(folder)[:16]
    return ctx.cache["model"]


def _by_user(previous: Table, buckets: int) -> Bucketed:
    """An earlier output by buckets of users: each of its parts is one, where it was made in as many."""
    made = previous.manifest or {}
    if made.get("stage") == EmbedUsers.name and len(previous.parts) == buckets and previous.path.is_dir():
        return Bucketed(previous, "user_id", buckets, True)
    return bucketed(previous, by="user_id", buckets=buckets)


def _newest_before(events: Table, time: int) -> int:
    scan = events.scan(["timestamp"]).filter(pl.col("timestamp") < time)
    return int(scan.select(pl.col("timestamp").max()).collect().item() or 0)


def _erased(path: Path, dtype: pl.DataType) -> pl.Series:
    """Ids of the users to leave out, from one Parquet file with a column `user_id`."""
    try:
        return pl.scan_parquet(path, glob=False).select(pl.col("user_id").cast(dtype)).collect().to_series()
    except (pl.exceptions.PolarsError, OSError) as fault:
        raise ContractError(
            f"{path}: not a Parquet file with a column `user_id` of {dtype}", "write one id a row"
        ) from fault
