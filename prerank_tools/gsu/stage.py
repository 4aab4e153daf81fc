"""`gsu topk`: the K behaviours of a user's past nearest to each candidate, and their SimTier histogram."""
# M candidates, K kept, S recent, U distinct items of a shard

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.gsu.frames import Search, flat_requests, search_of
from prerank_tools.gsu.modes import topk_by_ids, topk_by_prefix
from prerank_tools.gsu.output_frames import LIST_COLUMNS, TIER_COLUMNS, Emit, gsu_frame
from prerank_tools.gsu.search import TopK, topk
from prerank_tools.gsu.shard_frames import bucket_rows, candidates_of, events_of, log_of, requests_of
from prerank_tools.gsu.simtier import TIERS
from prerank_tools.gsu.two_step import Index, Recall, TwoStepConfig, topk_two_step
from prerank_tools.gsu.vector_frames import (
    ItemVectors,
    held_vectors,
    is_large,
    map_vectors,
    open_mapped,
    read_vectors,
)
from prerank_tools.stage import Context, Part, Shard, Stage, Trial
from prerank_tools.tables.parquet import write_parquet
from prerank_tools.tables.vectors import vectors_to_numpy

Mode = Literal["cosine", "sim-soft", "sim-hard", "sid-prefix"]
PIECE_ROWS = 20_000  # candidates that --dry-run weighs each --emit on
SHARD_BYTES = 64 << 20  # of output rows a shard holds; its arrays are some eight times that
TIER_BYTES = 2 * TIERS + 4 + 16


class GsuConfig(BaseModel):
    """How many behaviours to keep (MUSE: 50), how many recent ones to count (50), the log's lag (s)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: int = Field(default=50, ge=1, le=255)
    recent: int = Field(default=50, ge=0, le=255)
    lag: int = Field(default=0, ge=0)
    index: TwoStepConfig = TwoStepConfig()


@dataclass(frozen=True)
class GsuTopK(Stage):
    """gsu_topk: request_id, item_id, has_vector, n_valid; top-K lists and raw SimTier counts as `emit` says.

    A shard is one bucket of users, or a slice of it where requests hold many candidates.
    """

    name: ClassVar[str] = "gsu.topk"
    output: ClassVar[str] = "gsu_topk"
    sort_key: ClassVar[tuple[str, ...]] = ("request_id", "item_id")

    requests: Path
    events: Path
    embeddings: Path
    mode: Mode = "cosine"
    emit: Emit = "both"
    id_embeddings: Path | None = None
    items: Path | None = None
    category: str = "category"
    sids: Path | None = None
    missing: Literal["zero", "fail"] = "zero"
    two_step: Index | None = None
    min_recall: float = 0.95
    config: GsuConfig = field(default_factory=GsuConfig)

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        """The requests, the log, the vectors, and what the mode needs beside them."""
        found = {
            "requests": (self.requests, "requests"),
            "events": (self.events, "events"),
            "embeddings": (self.embeddings, "item_embeddings"),
        }
        role, path, contract = self._measure()
        if role and path is None:
            raise UsageError(
                f"--mode {self.mode} needs --{role.replace('_', '-')}", f"add --{role.replace('_', '-')} PATH"
            )
        return found | ({role: (path, contract)} if role and path else {})

    def params(self) -> Mapping[str, Any]:
        """Mode, what is emitted, K and the lag; the category column where it counts."""
        chosen = {
            "mode": self.mode,
            "emit": self.emit,
            "missing": self.missing,
            **self.config.model_dump(mode="json"),
        }
        if self.two_step is None:
            chosen.pop("index")
        else:
            chosen |= {"two_step": self.two_step, "min_recall": self.min_recall}
        return chosen | ({"category": self.category} if self.mode == "sim-hard" else {})

    def check(self, ctx: Context) -> None:
        """Refuse ids of two types, a category column that is not there, an index for another mode."""
        if self.two_step and self.mode != "cosine":
            raise UsageError(f"--two-step goes with --mode cosine, not {self.mode}", "leave --two-step out")
        for role, column in (("events", "user_id"), ("events", "item_id"), ("embeddings", "item_id")):
            asked = ctx.table("requests").scan().collect_schema()
            mine = asked[column] if column in asked else asked["candidates"].inner  # type: ignore[attr-defined]
            found = ctx.table(role).scan([column]).collect_schema()[column]
            if found != mine:
                raise ContractError(
                    f"{ctx.table(role).path}: `{column}` is {found}, in {self.requests} it is {mine}",
                    "cast one of them to the other",
                )
        if self.mode == "sim-hard" and self.category not in ctx.table("items").schema:
            raise ContractError(
                f"{self.items}: no column `{self.category}`", "name it with --category-column"
            )

    def prepare(self, ctx: Context) -> None:
        """Map a catalogue too large to hold in every worker; bucket rows that lie in no buckets."""
        for role in self._vector_roles():
            if is_large(ctx.table(role)):
                map_vectors(ctx.table(role), ctx.scratch / role)
        bucket_rows(ctx)

    def plan(self, ctx: Context) -> Sequence[Shard]:
        """One shard a bucket of users; several where a bucket's rows would not fit in memory."""
        log = log_of(ctx)
        slices = -(-self._bytes(ctx) // (SHARD_BYTES * log.buckets))
        return [
            Shard(
                index,
                str(self.events),
                0,
                shard.rows // slices,
                {**shard.extra, "slice": part, "slices": slices},
            )
            for index, (shard, part) in enumerate((s, p) for s in log.shards() for p in range(slices))
        ]

    def process(self, shard: Shard, ctx: Context) -> Part:
        """Search the users of one bucket."""
        requests, bad = requests_of(shard, ctx)
        asked = flat_requests(requests)
        search = search_of(asked, events_of(shard, ctx), lag=self.config.lag)
        found, has_vector_M, recall = self._search(search, ctx)
        counts = _counts(requests, search, found, has_vector_M)
        counts |= {"recall_found": recall.found, "recall_wanted": recall.wanted}
        frame = gsu_frame(search, found, has_vector_M, self.emit, threads=ctx.threads)
        counts["rows_in"] = len(requests) + len(bad)
        if shard.index == 0:
            unusable, rows = self._unusable(ctx)
            bad = pl.concat([bad, unusable], how="diagonal_relaxed")
            counts["rows_in"] += rows
        return Part(frame, bad, counts)

    def quality(self, counts: Mapping[str, float], ctx: Context) -> Mapping[str, Any]:
        """Shares of what was found and what was missing."""
        if self.missing == "fail":
            _forbid(counts)
        rows = max(1, counts["candidates"])
        recall = counts["recall_found"] / counts["recall_wanted"] if counts["recall_wanted"] else 1.0
        if self.two_step:
            ctx.hold(
                "recall",
                passed=recall >= self.min_recall,
                message=f"--two-step {self.two_step}: {recall:.4f} of the exact top {self.config.k} "
                f"were found, less than --min-recall {self.min_recall:g}",
                hint="look harder: raise `probe`, `breadth` or `listed` under [gsu.topk.index] of --config",
            )
        measured = {"two_step_recall": recall} if self.two_step else {}
        return measured | {
            "cold_share": counts["cold"] / rows,
            "without_vector_share": counts["without_vector"] / rows,
            "full_share": counts["full"] / rows,
            "mean_top_sim": counts["top_sim"] / max(1, counts["found"]),
        }

    def data_cutoff(self, ctx: Context) -> int | None:
        """Log and requests are read as of each request's own time and leave no trace of later."""
        strict = ("events", "requests")
        cutoffs = [table.data_cutoff for role, table in ctx.inputs.items() if role not in strict]
        return max((cutoff for cutoff in cutoffs if cutoff is not None), default=None)

    def estimate(self, ctx: Context, shards: Sequence[Shard]) -> Mapping[str, Any]:
        """A row a candidate; what each --emit would weigh, from a piece of one shard."""
        rows = candidates_of(ctx)
        middle = sorted(shards, key=lambda shard: shard.rows)[len(shards) // 2]
        pieces = max(1, rows // (len(shards) * PIECE_ROWS))
        piece = replace(middle, extra={**middle.extra, "slices": middle.extra["slices"] * pieces})
        return {"rows_out": rows, "bytes_if": self._bytes_if(piece, rows, ctx)}

    def _bytes_if(self, piece: Shard, rows: int, ctx: Context) -> dict[str, int]:
        found: dict[str, int] = {}
        with TemporaryDirectory(prefix="prerank-") as folder:
            trial = replace(ctx, work=Path(folder))
            self.prepare_trials(trial, [Trial(piece, 1)])
            frame = replace(self, emit="both").process(piece, trial).frame
            assert frame is not None
            for emit, others in (("topk", TIER_COLUMNS), ("simtier", LIST_COLUMNS), ("both", ())):
                path = Path(folder, emit)
                write_parquet(frame.drop(others), path, contract=self.output, compression=self.compression)
                found[f"emit {emit}"] = round(path.stat().st_size * rows / max(len(frame), 1))
        return found

    def prepare_trials(self, ctx: Context, trials: Sequence[Trial]) -> None:
        """Of a catalogue too large to hold, the vectors that the trials ask for."""
        wanted = {role for role in self._vector_roles() if is_large(ctx.table(role))}
        if not wanted:
            return
        items = pl.concat([self._items_of(trial.shard, ctx) for trial in trials]).unique()
        for role in wanted:
            scan = ctx.table(role).scan(["item_id", "embedding"])
            good = scan.filter(pl.col("item_id").is_in(items.implode())).drop_nulls().collect()
            ctx.cache[role] = held_vectors(good["item_id"], vectors_to_numpy(good["embedding"])), good.clear()

    def _items_of(self, shard: Shard, ctx: Context) -> pl.Series:
        """Every item that a shard asks about or finds in a past."""
        requests, _ = requests_of(shard, ctx)
        return search_of(flat_requests(requests), events_of(shard, ctx), lag=self.config.lag).items

    def _measure(self) -> tuple[str, Path | None, str]:
        return {
            "cosine": ("", None, ""),
            "sim-soft": ("id_embeddings", self.id_embeddings, "item_embeddings"),
            "sim-hard": ("items", self.items, "items"),
            "sid-prefix": ("sids", self.sids, "item_sids"),
        }[self.mode]

    def _vector_roles(self) -> list[str]:
        return ["embeddings", *(["id_embeddings"] if self.mode == "sim-soft" else [])]

    def _bytes(self, ctx: Context) -> int:
        row = {
            "topk": self.config.k * 14 + 16,
            "simtier": TIER_BYTES,
            "both": self.config.k * 14 + TIER_BYTES,
        }
        return candidates_of(ctx) * row[self.emit]

    def _search(self, search: Search, ctx: Context) -> tuple[TopK, np.ndarray, Recall]:
        """What the mode finds, in the order of the search; which candidates have a vector; recall."""
        table_VD, row_U = self._vectors("embeddings", ctx).gather(search.items)
        groups = search.with_rows(row_U)
        k, recent = self.config.k, self.config.recent if self.emit != "topk" else 0
        recall = Recall(0, 0)
        if self.two_step:
            found, recall = topk_two_step(
                table_VD,
                groups,
                self.two_step,
                self.config.index,
                k=k,
                recent=recent,
                threads=ctx.threads,
            )
        elif self.mode == "cosine":
            backend: Any = "cuda" if ctx.device == "cuda" else "numba"
            found = topk(table_VD, groups, k=k, recent=recent, threads=ctx.threads, backend=backend)
        elif self.mode == "sim-soft":
            id_UE = _by_row(*self._vectors("id_embeddings", ctx).gather(search.items), row_U, len(table_VD))
            found = topk_by_ids(id_UE, table_VD, groups, k=k, recent=recent, threads=ctx.threads)
        else:
            codes_U = self._codes(search.items, ctx)
            found = topk_by_prefix(
                _by_row(codes_U, np.arange(len(row_U)), row_U, len(table_VD)),
                table_VD,
                groups,
                k=k,
                recent=recent,
            )
        return found, groups.candidate_rows_M >= 0, recall

    def _codes(self, items: pl.Series, ctx: Context) -> np.ndarray:
        """(U, L) codes to match: a category as one level, or the SID; -1 where an item has none."""
        if self.mode == "sim-hard":
            found = ctx.table("items").scan(["item_id", self.category]).drop_nulls().collect()
            level = found.select("item_id", pl.col(self.category).rank("dense").cast(pl.Int64).alias("codes"))
            codes = (
                items.alias("item_id").to_frame().join(level, on="item_id", how="left", maintain_order="left")
            )
            return codes["codes"].fill_null(-1).to_numpy()[:, None]
        found = (
            ctx.table("sids")
            .scan(["item_id", "codes"])
            .filter(pl.col("item_id").is_in(items.implode()))
            .collect()
        )
        levels = found["codes"].dtype.size  # type: ignore[attr-defined]
        code_UL = np.full((len(items), levels), -1, dtype=np.int64)
        at = found.select("item_id").join(
            items.alias("item_id").to_frame().with_row_index("at"),
            on="item_id",
            how="left",
            maintain_order="left",
        )
        code_UL[at["at"].to_numpy()] = vectors_to_numpy(found["codes"])
        return code_UL

    def _vectors(self, role: str, ctx: Context) -> ItemVectors:
        return self._opened(role, ctx)[0]

    def _opened(self, role: str, ctx: Context) -> tuple[ItemVectors, pl.DataFrame]:
        if role not in ctx.cache:
            table = ctx.table(role)
            ctx.cache[role] = open_mapped(ctx.scratch / role) if is_large(table) else read_vectors(table)
        opened: tuple[ItemVectors, pl.DataFrame] = ctx.cache[role]
        return opened

    def _unusable(self, ctx: Context) -> tuple[pl.DataFrame, int]:
        """Rows of the vector tables that cannot be used, and how many rows those tables have."""
        roles = self._vector_roles()
        bad = pl.concat([self._opened(role, ctx)[1] for role in roles], how="vertical_relaxed")
        return bad, sum(ctx.table(role).rows for role in roles)


def _by_row(values_XY: np.ndarray, value_row_U: np.ndarray, row_U: np.ndarray, rows: int) -> np.ndarray:
    """Values of items, moved to the rows of another table; zeros (codes: -1) where an item has none."""
    moved = np.full(
        (rows, values_XY.shape[1]), -1 if values_XY.dtype == np.int64 else 0, dtype=values_XY.dtype
    )
    both = (row_U >= 0) & (value_row_U >= 0)
    moved[row_U[both]] = values_XY[value_row_U[both]]
    return moved


def _counts(
    requests: pl.DataFrame, search: Search, found: TopK, has_vector_M: np.ndarray
) -> dict[str, int | float]:
    kept_M = np.minimum(found.n_valid_M, found.positions_MK.shape[1])
    return {
        "requests": requests["request_id"].n_unique(),
        "candidates": len(has_vector_M),
        "cold": int((search.groups.visible_M == 0).sum()),
        "without_vector": int((~has_vector_M).sum()),
        "found": int((kept_M > 0).sum()),
        "full": int((kept_M == found.positions_MK.shape[1]).sum()),
        "top_sim": float(found.sims_MK[kept_M > 0, 0].astype(np.float64).sum()),
    }


def _forbid(counts: Mapping[str, float]) -> None:
    cold, without = int(counts["cold"]), int(counts["without_vector"])
    if cold or without:
        raise ContractError(
            f"--missing fail: {cold} candidates of users without a past, {without} without a vector",
            "embed those items, or allow them: --missing zero",
        )
