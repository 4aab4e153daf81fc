"""`eval gsu`: what the retrieved behaviours tell of the labels, and how much of an exact search was found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prerank_tools.errors import ContractError
from prerank_tools.gsu.simtier import TIERS
from prerank_tools.metrics.ranking import auc, grouped_auc
from prerank_tools.tables.table import Table, open_table, read_shard, shards_of

KEY = ["request_id", "item_id"]


def evaluate_gsu(gsu: Path, *, requests: Path | None = None, against: Path | None = None) -> dict[str, Any]:
    """Shares of cold rows and full lists; AUC and GAUC of the cosines as they stand, for every label.

    No model is trained: `top_sim` ranks by the best cosine, `mean_sim` by the mean of the K, `recent` by the
    mean tier of the latest behaviours. With `against` (an exact search): recall and equal histograms.
    """
    table = open_table(gsu, "gsu_topk")
    rows = pl.concat([_summary(frame) for frame in _frames(table)])
    report: dict[str, Any] = {
        "rows": len(rows),
        "requests": rows["request_id"].n_unique(),
        "empty_share": float(np.mean(rows["kept"].to_numpy() == 0)),
        "mean_kept": float(np.mean(rows["kept"].to_numpy())),
    }
    if "has_vector" in rows.columns:
        report["without_vector_share"] = float(np.mean(~rows["has_vector"].to_numpy()))
    if requests is not None:
        report |= _against_labels(rows, open_table(requests, "requests"))
    if against is not None:
        report["against"] = _against_exact(table, open_table(against, "gsu_topk"))
    return report


def _frames(table: Table) -> Iterator[pl.DataFrame]:
    return (read_shard(shard) for shard in shards_of(table))


def _summary(frame: pl.DataFrame) -> pl.DataFrame:
    """One row a candidate: how many behaviours, and what their cosines say."""
    told: list[Any]
    if "sims" in frame.columns:
        sims = pl.col("sims").cast(pl.List(pl.Float32))
        told = [
            sims.list.len().alias("kept"),
            sims.list.max().alias("top_sim"),
            sims.list.mean().alias("mean_sim"),
        ]
    else:
        tiers = frame["simtier"].explode().to_numpy().reshape(len(frame), -1)
        highest = np.where(tiers.any(1), TIERS - 1 - np.argmax(tiers[:, ::-1] > 0, axis=1), np.nan)
        told = [
            pl.Series("kept", tiers.sum(1, dtype=np.int64)),
            pl.Series("top_sim", highest, nan_to_null=True),
            pl.Series("mean_sim", _mean_tier(tiers), nan_to_null=True),
        ]
    if "simtier_recent" in frame.columns:
        recent = frame["simtier_recent"].explode().to_numpy().reshape(len(frame), -1)
        told.append(pl.Series("recent", _mean_tier(recent), nan_to_null=True))
    flags = [pl.col("has_vector")] if "has_vector" in frame.columns else []
    return frame.select(*KEY, *flags, *told)


def _mean_tier(counts_MN: np.ndarray) -> np.ndarray:
    total_M = counts_MN.sum(1, dtype=np.float64)
    return np.divide(
        counts_MN @ np.arange(float(TIERS)), total_M, out=np.full(len(total_M), np.nan), where=total_M > 0
    )


def _against_labels(rows: pl.DataFrame, requests: Table) -> dict[str, Any]:
    labels = [name for name in requests.schema if name.startswith("label_")]
    if not labels:
        raise ContractError(f"{requests.path}: no column `label_<task>`", "give requests with labels")
    listed = "candidates" in requests.schema
    item = "candidates" if listed else "item_id"
    asked = requests.read(["request_id", "user_id", item, *labels])
    asked = asked.explode(item, *labels) if listed else asked
    joined = rows.join(asked.rename({item: "item_id"}), on=KEY, how="inner")
    if joined.is_empty():
        raise ContractError(
            f"{requests.path}: no candidate of it is in this table", "give the requests searched"
        )
    user = joined["user_id"].rank("dense").to_numpy()
    report: dict[str, Any] = {}
    for name in labels:
        label = joined[name].fill_null(0).to_numpy()
        report[name.removeprefix("label_")] = {
            column: _ranking(label, joined[column].fill_null(-2.0).to_numpy(), user)
            for column in ("top_sim", "mean_sim", "recent")
            if column in joined.columns
        }
    return report


def _ranking(label: np.ndarray, score: np.ndarray, user: np.ndarray) -> dict[str, Any]:
    grouped = grouped_auc(label, score, user)
    return {
        "auc": auc(label, score),
        "gauc": grouped.gauc,
        "users": grouped.groups,
        "dropped": grouped.dropped,
    }


def _against_exact(table: Table, exact: Table) -> dict[str, Any]:
    """Recall of behaviours by position, where both have lists; share of rows with the same histogram."""
    columns = [name for name in ("positions", "simtier") if name in table.schema and name in exact.schema]
    if not columns:
        raise ContractError(
            f"{exact.path}: shares neither positions nor simtier with {table.path}", "use --emit both"
        )
    truth = exact.read([*KEY, *columns])
    found, wanted, equal, rows = 0, 0, 0, 0
    for frame in _frames(table):
        both = frame.select(*KEY, *columns).join(truth, on=KEY, how="inner", suffix="_exact")
        rows += len(both)
        if "positions" in columns:
            hits = both.select(pl.col("positions").list.set_intersection("positions_exact").list.len().sum())
            found += int(hits.item() or 0)
            wanted += int(both["positions_exact"].list.len().sum())
        if "simtier" in columns:
            equal += int((both["simtier"] == both["simtier_exact"]).sum())
    report: dict[str, Any] = {"rows": rows}
    if "positions" in columns:
        report["recall"] = found / wanted if wanted else 1.0
    if "simtier" in columns:
        report["equal_simtier_share"] = equal / rows if rows else 1.0
    return report
