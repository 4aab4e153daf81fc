"""From codes to published SIDs: what stands from last night, collisions, duplicates, what to report."""
# N items, L levels, R rows whose vectors are needed, D dims

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prerank_tools.errors import ContractError
from prerank_tools.quantizers.codebook import Codebook, quantizer_of, token
from prerank_tools.quantizers.collisions import EMPTY, Ledger, Policy, Resolved, resolve
from prerank_tools.quantizers.drift import churn, measure_drift
from prerank_tools.quantizers.duplicates import content_groups, duplicate_floor
from prerank_tools.quantizers.fit_stage import SidConfig, vectors_of
from prerank_tools.quantizers.last_level import LastDistances
from prerank_tools.quantizers.residuals import last_distances
from prerank_tools.quantizers.sid_keys import pack_codes
from prerank_tools.quantizers.sid_metrics import SidCounts
from prerank_tools.stage import Context
from prerank_tools.tables.vectors import vectors_to_numpy

MOVING = ("capacity", "sinkhorn", "optimal")


@dataclass(frozen=True)
class Settled:
    """The published rows in the mapped order, duplicate groups, the report, and the drift guard's arrays."""

    frame: pl.DataFrame
    duplicates: pl.DataFrame
    quality: dict[str, Any]
    ledger: Ledger
    codes_NL: np.ndarray  # as assigned, before any policy
    error_NL: np.ndarray
    new_N: np.ndarray  # not published before


@dataclass(frozen=True)
class _Published:
    """What last night published of tonight's items, aligned with them."""

    known_N: np.ndarray
    codes_NL: np.ndarray  # rows that are not known hold zeros
    suffix_N: np.ndarray | None
    ledger: Ledger
    same_codebook: bool


def settle(
    frame: pl.DataFrame, codebook: Codebook, how: tuple[Policy, bool, SidConfig], ctx: Context
) -> Settled:
    """Publish the codes of the mapped rows under a collision policy; published SIDs stand where they may."""
    policy, reassign, config = how
    codes_NL, error_NL = vectors_to_numpy(frame["codes"]), vectors_to_numpy(frame["error"])
    before = _published(frame["item_id"], codebook, ctx)
    kept_N, edited_N = _kept(codes_NL, before, policy, reassign)
    start_NL = np.where(kept_N[:, None], before.codes_NL, codes_NL)
    resolved = resolve(
        start_NL,
        frame["item_id"].to_numpy(),
        sizes=codebook.sizes,
        policy=policy,
        distances=_distances(start_NL, codebook, ctx) if policy in MOVING else None,
        width=config.suffix_width,
        capacity=config.capacity,
        published_N=kept_N,
        suffix_N=before.suffix_N,
        ledger=before.ledger,
    )
    first_N = content_groups(frame["vector_hash"].to_numpy())
    rows = _rows(frame["item_id"], resolved)
    report = _report(frame, resolved, codebook, first_N)
    report["squared_error"] = float(error_NL[:, -1].sum(dtype=np.float64))
    report |= _life(before, kept_N, edited_N, resolved)
    new_N = ~before.known_N if before.same_codebook else np.ones(len(frame), dtype=bool)
    return Settled(
        frame=rows,
        duplicates=_duplicates(rows, first_N),
        quality=report,
        ledger=resolved.ledger.merge(before.ledger),
        codes_NL=codes_NL,
        error_NL=error_NL,
        new_N=new_N,
    )


def hold_drift(settled: Settled, codebook: Codebook, config: SidConfig, ctx: Context) -> None:
    """Gates on the new items: does the frozen codebook still fit them? If not, a refit is advised."""
    new_N = settled.new_N
    if not codebook.stats or not new_N.any():
        return
    drift = measure_drift(settled.codes_NL[new_N], settled.error_NL[new_N], codebook.stats, codebook.sizes)
    settled.quality["drift"] = drift.as_dict()
    hint = "leave --codebook out to fit a new one (see --match), or publish anyway with --gate warn"
    ctx.hold(
        "codebook_psi",
        passed=drift.excess <= config.drift_psi,
        message=f"refit advised: {drift.items} new items use the codes otherwise than the fit set did "
        f"(PSI {drift.excess:.2f} above chance, limit {config.drift_psi:g})",
        hint=hint,
    )
    ctx.hold(
        "codebook_distance",
        passed=drift.farther <= config.drift_distance,
        message=f"refit advised: {drift.items} new items lie {drift.farther:.2f} times as far from their "
        f"codes as the fit set did (limit {config.drift_distance:g})",
        hint=hint,
    )


def ledger_to(folder: Path, settled: Settled) -> None:
    """Store the next free suffix of every SID, so that a freed one is never given again."""
    from safetensors.numpy import save_file

    if len(settled.ledger.key_M):
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"key": settled.ledger.key_M, "next": settled.ledger.next_M}
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()},
            folder / "ledger.safetensors",
        )


def _published(ids: pl.Series, codebook: Codebook, ctx: Context) -> _Published:
    levels = len(codebook.sizes)
    nothing = np.zeros((len(ids), levels), dtype=np.uint16)
    if "previous" not in ctx.inputs:
        return _Published(np.zeros(len(ids), dtype=bool), nothing, None, EMPTY, False)
    table = ctx.table("previous")
    same = table.lineage.get("codebook") == codebook.fingerprint
    old = table.read()
    found = ids.to_frame().join(old, on="item_id", how="left", maintain_order="left")
    known_N = found["codes"].is_not_null().to_numpy()
    codes_RL = vectors_to_numpy(found["codes"].drop_nulls())
    if same and codes_RL.shape[1] != levels:
        raise ContractError(
            f"{table.path}: SIDs of {codes_RL.shape[1]} levels, the codebook has {levels}",
            "name its own SIDs",
        )
    codes_NL = np.zeros((len(ids), codes_RL.shape[1]), dtype=np.uint16)
    codes_NL[known_N] = codes_RL
    suffix_N, ledger = None, EMPTY
    if same and "suffix" in found.columns:
        suffix_N = found["suffix"].fill_null(0).cast(pl.Int64).to_numpy()
        ledger = _ledger(table.path, old, codebook)
    return _Published(known_N, codes_NL, suffix_N, ledger, same)


def _ledger(previous: Path, old: pl.DataFrame, codebook: Codebook) -> Ledger:
    """The stored ledger; without one, what the rows tell (suffixes freed before are then unknown)."""
    from safetensors.numpy import load_file

    told = Ledger.of(
        pack_codes(vectors_to_numpy(old["codes"]), codebook.sizes), old["suffix"].fill_null(0).to_numpy()
    )
    path = previous / "suffixes" / "ledger.safetensors"
    if not path.is_file():
        return told
    stored = load_file(path)
    return told.merge(Ledger(stored["key"], stored["next"]))


def _kept(
    codes_NL: np.ndarray, before: _Published, policy: Policy, reassign: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(items whose published SID stands, items whose vector now leads elsewhere).

    Under a policy that moves last codes only the prefix tells an edit.
    """
    if not before.same_codebook:
        nothing_N = np.zeros(len(codes_NL), dtype=bool)
        return nothing_N, nothing_N
    levels = codes_NL.shape[1] - (policy in MOVING)
    edited_N = before.known_N & (codes_NL[:, :levels] != before.codes_NL[:, :levels]).any(axis=1)
    return before.known_N & ~edited_N if reassign else before.known_N, edited_N


def _distances(codes_NL: np.ndarray, codebook: Codebook, ctx: Context) -> LastDistances:
    """Distances to last codes for rows of crowded prefixes; their vectors lie in a scratch file."""
    prefix_N = (
        pack_codes(codes_NL[:, :-1], codebook.sizes[:-1])
        if codes_NL.shape[1] > 1
        else np.zeros(len(codes_NL), np.int64)
    )
    key_N = prefix_N * codebook.sizes[-1] + codes_NL[:, -1]
    order_N = np.argsort(key_N, kind="stable")
    again_N = np.zeros(len(key_N), dtype=bool)
    again_N[order_N[1:]] = key_N[order_N[1:]] == key_N[order_N[:-1]]
    rows_R = np.flatnonzero(np.isin(prefix_N, prefix_N[again_N]))
    width = codebook.width
    x_RD = np.memmap(
        ctx.scratch / "crowded.f32", dtype=np.float32, mode="w+", shape=(max(1, len(rows_R)), width)
    )
    for at, x_nD in vectors_of(ctx.table("embeddings"), rows_R):
        x_RD[at] = x_nD
    quantizer = quantizer_of(codebook)

    def distances(asked: np.ndarray) -> np.ndarray:
        return last_distances(quantizer, x_RD[np.searchsorted(rows_R, asked)], codes_NL[asked])

    return distances


def _rows(ids: pl.Series, resolved: Resolved) -> pl.DataFrame:
    """item_id, codes, sid and, where items are numbered, suffix; the SID then ends in its token."""
    codes = pl.Series("codes", np.ascontiguousarray(resolved.codes_NL.astype(np.uint16)))
    frame = pl.DataFrame([ids, codes.cast(pl.Array(pl.UInt16, resolved.codes_NL.shape[1]))])
    words = [pl.col("codes").arr.get(level) for level in range(resolved.codes_NL.shape[1])]
    if resolved.suffix_N is not None:
        frame = frame.with_columns(pl.Series("suffix", resolved.suffix_N, dtype=pl.UInt32))
        words.append(pl.col("suffix"))
    template = "".join(token(level, 0).replace("0", "{}") for level in range(len(words)))
    frame = frame.with_columns(pl.format(template, *words).alias("sid"))
    return frame.select([name for name in ("item_id", "codes", "sid", "suffix") if name in frame.columns])


def _report(
    frame: pl.DataFrame, resolved: Resolved, codebook: Codebook, first_N: np.ndarray
) -> dict[str, Any]:
    """Collisions beside the floor that no codebook can pass, and the use of every level."""
    counts = SidCounts(codebook.sizes)
    counts.update(resolved.codes_NL)
    use = counts.finalize()
    floor = duplicate_floor(first_N)
    found: dict[str, Any] = {
        "items": use.items,
        "sids": use.sids,
        "collision_rate": use.collision_rate,
        "duplicate_floor": floor,
        "collision_above_floor": max(0.0, use.collision_rate - floor),
        "exclusive_items": use.exclusive_items,
        "largest_sid": use.largest_sid,
    }
    if "content_hash" in frame.columns:
        found["content_floor"] = duplicate_floor(content_groups(frame["content_hash"].hash().to_numpy()))
    if resolved.suffix_N is not None:
        found["largest_suffix"] = int(resolved.suffix_N.max(initial=0))
    if resolved.moved or resolved.unresolved:
        found |= {"moved": resolved.moved, "unresolved": resolved.unresolved}
    return found | {"levels": use.as_dict()["levels"]}


def _life(before: _Published, kept_N: np.ndarray, edited_N: np.ndarray, resolved: Resolved) -> dict[str, Any]:
    """What became of the SIDs published before: kept under the same codebook, or moved by a refit."""
    known_N = before.known_N
    if not known_N.any():
        return {}
    if not before.same_codebook:
        moved = churn(before.codes_NL[known_N], resolved.codes_NL[known_N])
        return {"churn": {"items": int(known_N.sum()), **moved}}
    moved_N = (before.codes_NL != resolved.codes_NL).any(axis=1) & known_N
    return {
        "published": {
            "kept": int((known_N & ~moved_N).sum()),
            "moved": int(moved_N.sum()),
            "new": int((~known_N).sum()),
            "edited": int(edited_N.sum()),
        }
    }


def _duplicates(rows: pl.DataFrame, first_N: np.ndarray) -> pl.DataFrame:
    """Items with identical vectors, the largest group first: group, items, item_id, sid."""
    grouped = rows.select("item_id", "sid").with_columns(pl.Series("first", first_N))
    grouped = grouped.with_columns(pl.len().over("first").cast(pl.UInt32).alias("items")).filter(
        pl.col("items") > 1
    )
    grouped = grouped.sort(["items", "first", "item_id"], descending=[True, False, False])
    numbered = grouped.with_columns((pl.col("first").rle_id()).cast(pl.UInt32).alias("group"))
    return numbered.select("group", "items", "item_id", "sid")
