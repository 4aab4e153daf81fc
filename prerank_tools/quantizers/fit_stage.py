"""Fit the codebook of `quantize sid`: a sample of the items in bounded memory, then the quantizer."""
# N items, D dims, L levels

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, field_validator

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.quantizers.codebook import Codebook, Quantizer, quantizer_class
from prerank_tools.quantizers.drift import fit_stats
from prerank_tools.quantizers.residuals import level_errors
from prerank_tools.quantizers.rkmeans import POINTS_PER_CODE, check_rows, fitting_size
from prerank_tools.quantizers.sid_keys import check_sizes
from prerank_tools.stage import Context, Shard
from prerank_tools.tables.bucketing import hash_ids
from prerank_tools.tables.contracts import split_rows
from prerank_tools.tables.table import Table, read_shard, shards_of
from prerank_tools.tables.vectors import vectors_to_numpy

POINTS_ADVISED = 39  # faiss' own warning: with fewer, centroids follow single items
COLUMNS = ("item_id", "embedding", "scale", "content_hash")
HELD_OUT = 8  # items; fewer give no standard error to speak of
# Keys that only some of the kinds have.
KNOBS = {"init", "normalize", "residual_norm", "beam", "refine", "balance"}
LARGEST = 1 << 16  # codes of a level: they are uint16
COPIES = 4  # of the sample that a fit holds: as read, in order, the residual, faiss' own


class SidConfig(BaseModel):
    """Knobs of `quantize sid`: the codebook to fit where none is given, collisions, and the drift guard.

    `codes` is one number, or one a level; unset it is 256, less where the catalogue is too small for that.
    `refine = 30` has the lowest error, also on items that were not fitted. `init = "random"` gives the codes
    of a plain faiss loop; its deeper levels may collapse.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quantizer: Literal["rkmeans", "balanced-rkmeans", "pq", "random-hash"] = "rkmeans"
    levels: int = Field(default=3, ge=1, le=26)
    codes: int | tuple[int, ...] | None = None
    iterations: int = Field(default=25, ge=1)
    init: Literal["random", "progressive"] = "progressive"
    normalize: Literal["none", "l2"] = "none"
    residual_norm: bool = False
    beam: int = Field(default=1, ge=1)
    refine: int = Field(default=0, ge=0)
    balance: Literal["last", "all"] = "last"
    seed: int = 0
    sample_rows: int | None = Field(default=None, ge=2)
    fit_memory_mb: int = Field(default=2_048, ge=1)
    suffix_width: int = Field(default=256, ge=1)
    capacity: int = Field(default=5, ge=1)
    drift_psi: float = Field(default=0.25, gt=0)
    drift_distance: float = Field(default=1.2, gt=0)

    @field_validator("codes")
    @classmethod
    def _possible(cls, codes: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        sizes = codes if isinstance(codes, tuple) else () if codes is None else (codes,)
        if codes == () or not all(1 <= size <= LARGEST for size in sizes):
            raise ValueError(f"one number from 1 to {LARGEST}, or one for each level")
        return codes


def fit_codebook(
    table: Table,
    config: SidConfig,
    ctx: Context,
    *,
    known: pl.Series | None = None,
    unfitted: Callable[[tuple[int, ...], Any], Quantizer] | None = None,
) -> Codebook:
    """A codebook fitted on a sample of `table`, or of those of its items that are `known`.

    `unfitted(sizes, config)` makes the quantizer where it is not one of `SidConfig`'s kinds. Says aloud what
    it chose. Raises ContractError where there are fewer vectors than codes.
    """
    unfitted = unfitted or _unfitted
    sizes = _sizes(table.rows if known is None else len(known), config)
    check_sizes(sizes)
    limit = _sample_limit(table, max(sizes), config, ctx)
    x_ND = sample_vectors(table, limit, seed=config.seed, known=known)
    check_rows(len(x_ND), sizes)
    if known is None and len(x_ND) < min(limit, table.rows):
        ctx.log("sample", left_out=min(limit, table.rows) - len(x_ND), reason="no usable vector")
    _say(len(x_ND), sizes, config, ctx)
    quantizer = unfitted(sizes, config)
    quantizer.fit(x_ND, seed=config.seed, threads=ctx.threads, device=ctx.device)
    stats = _reference(quantizer, x_ND, config, ctx, unfitted)
    return replace(quantizer.to_codebook(), stats=stats).with_lineage(table.lineage)


def _reference(
    quantizer: Quantizer,
    x_ND: np.ndarray,
    config: SidConfig,
    ctx: Context,
    unfitted: Callable[[tuple[int, ...], Any], Quantizer],
) -> dict[str, np.ndarray]:
    """What new items are held against; distances of a tenth left out where codes follow single items."""
    codes_NL = quantizer.encode(x_ND, threads=ctx.threads, device=ctx.device)
    if len(x_ND) >= POINTS_ADVISED * max(quantizer.sizes):
        return fit_stats(codes_NL, level_errors(quantizer, x_ND, codes_NL), quantizer.sizes)
    out_ND, in_ND = x_ND[::10], np.delete(x_ND, np.s_[::10], axis=0)
    if len(out_ND) < HELD_OUT or len(in_ND) < max(quantizer.sizes):
        ctx.log("fit", note=f"{len(x_ND)} items are too few to tell drift later: no drift guard")
        return {}
    other = unfitted(quantizer.sizes, config)
    other.fit(in_ND, seed=config.seed, threads=ctx.threads, device=ctx.device)
    held_NL = other.encode(out_ND, threads=ctx.threads, device=ctx.device)
    return fit_stats(codes_NL, level_errors(other, out_ND, held_NL), quantizer.sizes)


def trial_fits(rows: int, config: SidConfig) -> tuple[SidConfig, SidConfig]:
    """For --dry-run: one iteration on the whole sample, for its memory; a quarter of it, for real codes."""
    codes = max(_sizes(rows, config))
    quarter = max(codes, (config.sample_rows or POINTS_PER_CODE * codes) // 4)
    return (
        config.model_copy(update={"iterations": 1}),
        config.model_copy(update={"sample_rows": max(2, quarter)}),
    )


def sample_vectors(table: Table, limit: int, *, seed: int, known: pl.Series | None = None) -> np.ndarray:
    """At most `limit` vectors (N, D): those whose id has the smallest seeded hash, in the order of it.

    One pass over the ids, one over the vectors; memory for the sample alone. The same items give the same
    sample however the table is ordered or cut into parts, which a reservoir would not.
    """
    ids = table.scan(["item_id"]).drop_nulls().collect()["item_id"]
    if known is not None:
        ids = ids.filter(ids.is_in(known.implode()))
    salt = np.random.default_rng(seed).integers(0, 2**63, dtype=np.uint64)
    ordered = pl.DataFrame({"item_id": ids, "order": hash_ids(ids) ^ salt}).sort("order", "item_id")
    chosen = ordered.head(limit).select("item_id").with_row_index("at")
    x_ND: np.ndarray | None = None
    filled_N = np.zeros(len(chosen), dtype=bool)
    for shard in shards_of(table):
        frame, x_nD, _ = read_vectors(shard)
        at = frame.select("item_id").join(chosen, on="item_id", how="left", maintain_order="left")["at"]
        found_n = at.is_not_null().to_numpy()
        at_n = at.drop_nulls().to_numpy()
        if x_ND is None:
            x_ND = np.empty((len(chosen), x_nD.shape[1]), dtype=x_nD.dtype)
        x_ND[at_n] = x_nD[found_n]
        filled_N[at_n] = True
    if x_ND is None or not filled_N.any():
        raise ContractError(f"{table.path}: no vector to fit on", "is --until before every event?")
    return x_ND[filled_N]


def read_vectors(shard: Shard) -> tuple[pl.DataFrame, np.ndarray, pl.DataFrame]:
    """(good rows without their vectors, the vectors, rows set aside) of one shard of item embeddings.

    float16 and int8 stay as they are, unless a `scale` column says what an int8 step is worth.
    """
    frame = read_shard(shard)
    frame = frame.select([name for name in COLUMNS if name in frame.columns])
    good, bad = split_rows(frame, "item_embeddings")
    x_ND = vectors_to_numpy(good["embedding"])
    if "scale" in good.columns:
        x_ND = x_ND.astype(np.float32) * good["scale"].cast(pl.Float32).to_numpy()[:, None]
    return good.drop("embedding"), x_ND, bad


def known_items(events: Table, until: int) -> pl.Series:
    """Items with an event before `until`: what a fit as of that time may know of."""
    columns = [name for name in ("item_id", "timestamp", "ingested_at") if name in events.schema]
    before = [pl.col(name) < until for name in columns[1:]]
    found = events.scan(columns).filter(*before).select(pl.col("item_id").drop_nulls().unique())
    return found.collect()["item_id"]


def vectors_of(table: Table, rows_N: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(places among the asked rows, their vectors) for good rows numbered in the order of the shards."""
    start = 0
    for shard in shards_of(table):
        frame, x_nD, _ = read_vectors(shard)
        order_n = frame["item_id"].arg_sort().to_numpy()
        low, high = np.searchsorted(rows_N, [start, start + len(frame)])
        if high > low:
            yield np.arange(low, high), x_nD[order_n[rows_N[low:high] - start]].astype(np.float32)
        start += len(frame)


def _sizes(rows: int, config: SidConfig) -> tuple[int, ...]:
    if config.codes is None:
        return (fitting_size(rows),) * config.levels
    if isinstance(config.codes, int):
        return (config.codes,) * config.levels
    if "levels" in config.model_fields_set and len(config.codes) != config.levels:
        raise UsageError(
            f"config: codes names {len(config.codes)} levels, levels says {config.levels}", "drop one of them"
        )
    return config.codes


def _sample_limit(table: Table, codes: int, config: SidConfig, ctx: Context) -> int:
    """Rows to fit on: enough for k-means, within the memory ceiling."""
    width = table.schema["embedding"].size if hasattr(table.schema["embedding"], "size") else 1_024
    ceiling = (config.fit_memory_mb << 20) // (4 * width * COPIES)
    wanted = config.sample_rows or POINTS_PER_CODE * codes
    if min(wanted, table.rows) > ceiling:
        ctx.log("sample", rows=ceiling, wanted=wanted, reason=f"fit_memory_mb = {config.fit_memory_mb}")
    return max(2, min(wanted, ceiling))


def _say(rows: int, sizes: tuple[int, ...], config: SidConfig, ctx: Context) -> None:
    shape = "x".join(str(size) for size in sizes)
    ctx.log("fit", quantizer=config.quantizer, codes=shape, items=rows, seed=config.seed)
    if config.codes is None and sizes[0] < fitting_size(1 << 30):
        ctx.log(
            "fit", note=f"{rows} items are few for 256 codes a level, so {sizes[0]}; `codes` overrides it"
        )
    elif rows < POINTS_ADVISED * max(sizes):
        ctx.log("fit", note=f"under {POINTS_ADVISED} items a code: codes follow single items, expect churn")


def _unfitted(sizes: tuple[int, ...], config: SidConfig) -> Quantizer:
    knobs: dict[str, Any] = {"sizes": sizes}
    wanted = {
        "rkmeans": ("iterations", "init", "normalize", "residual_norm", "beam", "refine"),
        "balanced-rkmeans": ("iterations", "init", "normalize", "balance"),
        "pq": ("iterations",),
        "random-hash": (),
    }[config.quantizer]
    ignored = config.model_fields_set & KNOBS - set(wanted)
    if ignored:
        raise UsageError(
            f"config: {config.quantizer} has no `{min(ignored)}`", f"it has: {', '.join(wanted)}"
        )
    knobs |= {name: getattr(config, name) for name in wanted}
    return quantizer_class(config.quantizer)(**knobs)
