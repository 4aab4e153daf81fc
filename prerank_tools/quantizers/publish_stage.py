"""From codes to published SIDs: what stands from last night, collisions, duplicates, what to report.

A SID is one integer here, an item a row number; ids, errors and texts stay in the mapped parts and are read
part by part, so that a row of the catalogue costs tens of bytes whatever it holds.
"""
# N items, n of one part, L levels, R rows whose vectors are needed, D dims

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from prerank_tools.quantizers.codebook import Codebook, quantizer_of, token
from prerank_tools.quantizers.collisions import Ledger, Policy, Resolved, resolve
from prerank_tools.quantizers.drift import Churn, NewItems
from prerank_tools.quantizers.duplicates import content_groups, hash_floor
from prerank_tools.quantizers.fit_stage import SidConfig, vectors_of
from prerank_tools.quantizers.last_level import LastDistances
from prerank_tools.quantizers.mapped_frames import Mapped
from prerank_tools.quantizers.published_frames import Published, published
from prerank_tools.quantizers.residuals import last_distances
from prerank_tools.quantizers.sid_keys import CHUNK, shared, unpack_codes
from prerank_tools.quantizers.sid_metrics import SidCounts
from prerank_tools.stage import Context

MOVING = ("capacity", "sinkhorn", "optimal")


@dataclass(frozen=True)
class Settled:
    """The published SIDs of the mapped rows, what is alike among them, and the report."""

    mapped: Mapped
    sizes: tuple[int, ...]
    resolved: Resolved
    duplicates: pl.DataFrame
    quality: dict[str, Any]
    ledger: Ledger
    old_N: np.ndarray  # published before under this codebook

    def frames(self) -> Iterator[pl.DataFrame]:
        """The published rows, part by part."""
        for at, frame in self.mapped.read("item_id"):
            yield sid_frame(frame["item_id"], self.resolved, self.sizes, np.arange(at.start, at.stop))


def settle(mapped: Mapped, codebook: Codebook, how: tuple[Policy, bool, SidConfig], ctx: Context) -> Settled:
    """Publish the codes of the mapped rows under a collision policy; published SIDs stand where they may."""
    policy, reassign, config = how
    alike, floor = _alike(mapped)
    before = published(mapped, ctx.table("previous") if "previous" in ctx.inputs else None, codebook)
    key_N = mapped.column("key", np.int64)
    kept_N, edited_N = _kept(key_N, before, codebook, policy, reassign)
    if before.key_N is not None:
        np.copyto(key_N, before.key_N, where=kept_N)
    resolved = resolve(
        key_N,
        _places(mapped, key_N, codebook, policy),
        sizes=codebook.sizes,
        policy=policy,
        distances=_distances(key_N, codebook, ctx) if policy in MOVING else None,
        width=config.suffix_width,
        capacity=config.capacity,
        published_N=kept_N,
        suffix_N=before.suffix_N,
        ledger=before.ledger,
    )
    report = _report(mapped, resolved, codebook, floor) | _life(before, edited_N, resolved, codebook)
    return Settled(
        mapped=mapped,
        sizes=codebook.sizes,
        resolved=resolved,
        duplicates=_duplicates(mapped, resolved, codebook.sizes, alike),
        quality=report,
        ledger=resolved.ledger.merge(before.ledger),
        old_N=before.known_N if before.key_N is not None else np.zeros(mapped.rows, dtype=bool),
    )


def hold_drift(settled: Settled, codebook: Codebook, config: SidConfig, ctx: Context) -> None:
    """Gates on the new items: does the frozen codebook still fit them? If not, a refit is advised."""
    if not codebook.stats or settled.old_N.all():
        return
    met, errors = NewItems(codebook.sizes), [f"error_{level + 1}" for level in range(len(codebook.sizes))]
    for at, frame in settled.mapped.read("key", *errors):
        new_n = ~settled.old_N[at]
        codes_nL = unpack_codes(frame["key"].to_numpy()[new_n], codebook.sizes)
        met.update(codes_nL, frame.select(errors).to_numpy()[new_n])
    drift = met.drift(codebook.stats)
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


def sid_frame(ids: pl.Series, resolved: Resolved, sizes: tuple[int, ...], rows_n: np.ndarray) -> pl.DataFrame:
    """item_id, codes, sid and, where items are numbered, suffix; the SID then ends in its token."""
    codes_nL = unpack_codes(resolved.key_N[rows_n], sizes).astype(np.uint16)
    codes = pl.Series("codes", codes_nL, dtype=pl.Array(pl.UInt16, len(sizes)))
    frame = pl.DataFrame([ids, codes])
    words = [pl.Series(codes_nL[:, level]) for level in range(len(sizes))]
    if resolved.suffix_N is not None:
        frame = frame.with_columns(pl.Series("suffix", resolved.suffix_N[rows_n], dtype=pl.UInt32))
        words.append(frame["suffix"])
    template = "".join(token(level, 0).replace("0", "{}") for level in range(len(words)))
    frame = frame.with_columns(pl.format(template, *words).alias("sid"))
    return frame.select([name for name in ("item_id", "codes", "sid", "suffix") if name in frame.columns])


def _kept(
    key_N: np.ndarray, before: Published, codebook: Codebook, policy: Policy, reassign: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(items whose published SID stands, items whose vector now leads elsewhere).

    Under a policy that moves last codes only the prefix tells an edit.
    """
    if before.key_N is None:
        nothing_N = np.zeros(len(key_N), dtype=bool)
        return nothing_N, nothing_N
    radix = codebook.sizes[-1] if policy in MOVING else 1
    edited_N = before.known_N & (key_N // radix != before.key_N // radix)
    return before.known_N & ~edited_N if reassign else before.known_N, edited_N


def _places(mapped: Mapped, key_N: np.ndarray, codebook: Codebook, policy: Policy) -> np.ndarray:
    """Order of the ids (N,) where it can matter: among items that share a SID, or a prefix with such."""
    if policy == "keep":
        return np.zeros(0, dtype=np.int64)
    return mapped.places(_crowded(key_N, codebook) if policy in MOVING else shared(key_N))


def _crowded(key_N: np.ndarray, codebook: Codebook) -> np.ndarray:
    """Items of a prefix in which two share a SID (N,) bool."""
    prefix_M = np.unique(key_N[shared(key_N)] // codebook.sizes[-1])
    crowded_N = np.zeros(len(key_N), dtype=bool)
    for start in range(0, len(key_N) if len(prefix_M) else 0, CHUNK):
        prefix_n = key_N[start : start + CHUNK] // codebook.sizes[-1]
        at_n = np.minimum(np.searchsorted(prefix_M, prefix_n), len(prefix_M) - 1)
        crowded_N[start : start + CHUNK] = prefix_M[at_n] == prefix_n
    return crowded_N


def _distances(key_N: np.ndarray, codebook: Codebook, ctx: Context) -> LastDistances:
    """Distances to last codes for rows of crowded prefixes; their vectors lie in a scratch file."""
    rows_R = np.flatnonzero(_crowded(key_N, codebook))
    x_RD = np.memmap(
        ctx.scratch / "crowded.f32", dtype=np.float32, mode="w+", shape=(max(1, len(rows_R)), codebook.width)
    )
    for at, x_nD in vectors_of(ctx.table("embeddings"), rows_R):
        x_RD[at] = x_nD
    quantizer = quantizer_of(codebook)

    def distances(asked: np.ndarray) -> np.ndarray:
        codes_RL = unpack_codes(key_N[asked], codebook.sizes).astype(np.uint16)
        return last_distances(quantizer, x_RD[np.searchsorted(rows_R, asked)], codes_RL)

    return distances


def _alike(mapped: Mapped) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """((items whose vector another one has, the first of each group), the duplicate floor)."""
    hash_N = mapped.column("vector_hash", np.uint64)
    rows_R = np.flatnonzero(shared(hash_N))
    return (rows_R, rows_R[content_groups(hash_N[rows_R])]), hash_floor(hash_N)


def _report(mapped: Mapped, resolved: Resolved, codebook: Codebook, floor: float) -> dict[str, Any]:
    """Collisions beside the floor that no codebook can pass, and the use of every level."""
    counts = SidCounts(codebook.sizes)
    for start in range(0, mapped.rows, CHUNK):
        counts.update(unpack_codes(resolved.key_N[start : start + CHUNK], codebook.sizes))
    use = counts.finalize()
    found: dict[str, Any] = {
        "items": use.items,
        "sids": use.sids,
        "collision_rate": use.collision_rate,
        "duplicate_floor": floor,
        "collision_above_floor": max(0.0, use.collision_rate - floor),
        "exclusive_items": use.exclusive_items,
        "largest_sid": use.largest_sid,
    }
    if mapped.has("content"):
        found["content_floor"] = hash_floor(mapped.column("content", np.uint64))
    if resolved.suffix_N is not None:
        found["largest_suffix"] = int(resolved.suffix_N.max(initial=0))
    if resolved.moved or resolved.unresolved:
        found |= {"moved": resolved.moved, "unresolved": resolved.unresolved}
    return found | {"levels": use.as_dict()["levels"]}


def _life(before: Published, edited_N: np.ndarray, resolved: Resolved, codebook: Codebook) -> dict[str, Any]:
    """What became of the SIDs published before: kept under the same codebook, or moved by a refit."""
    known_N = before.known_N
    if not known_N.any():
        return {}
    if before.key_N is None:
        assert before.codes_NL is not None
        churn = Churn()
        for start in range(0, len(known_N), CHUNK):
            at_n = start + np.flatnonzero(known_N[start : start + CHUNK])
            churn.update(before.codes_NL[at_n], unpack_codes(resolved.key_N[at_n], codebook.sizes))
        return {"churn": {"items": int(known_N.sum()), **churn.shares()}}
    moved_N = (before.key_N != resolved.key_N) & known_N
    return {
        "published": {
            "kept": int((known_N & ~moved_N).sum()),
            "moved": int(moved_N.sum()),
            "new": int((~known_N).sum()),
            "edited": int(edited_N.sum()),
        }
    }


def _duplicates(
    mapped: Mapped,
    resolved: Resolved,
    sizes: tuple[int, ...],
    alike: tuple[np.ndarray, np.ndarray],
) -> pl.DataFrame:
    """Items with identical vectors, the largest group first: group, items, item_id, sid."""
    rows_R, first_R = alike
    rows = sid_frame(mapped.ids(rows_R), resolved, sizes, rows_R)
    grouped = rows.select("item_id", "sid").with_columns(pl.Series("first", first_R))
    grouped = grouped.with_columns(pl.len().over("first").cast(pl.UInt32).alias("items"))
    grouped = grouped.sort(["items", "first", "item_id"], descending=[True, False, False])
    numbered = grouped.with_columns((pl.col("first").rle_id()).cast(pl.UInt32).alias("group"))
    return numbered.select("group", "items", "item_id", "sid")
