"""Rows held against a contract: the good ones go on, the others are set aside with a reason."""

from __future__ import annotations

import polars as pl

from prerank_schemas import CONTRACTS
from prerank_tools.tables.vectors import faulty_vectors


def split_rows(frame: pl.DataFrame, contract: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(good rows, quarantine): quarantine holds the contract's key columns and `reason`.

    A row is at fault where a column that must not be null is null, or where a vector is null, not finite,
    all zeros or out of float32's scale.
    """
    rules = CONTRACTS[contract]
    reason = pl.Series("reason", [None] * len(frame), dtype=pl.String)
    for column in rules.columns:
        if column.name not in frame.columns or column.nullable:
            continue
        if column.kind == "vector":
            found = faulty_vectors(frame[column.name])
        else:
            null = frame[column.name].is_null()
            found = pl.select(
                pl.when(null).then(pl.lit(f"{column.name} is null")).otherwise(None).cast(pl.String)
            ).to_series()
        reason = pl.select(pl.coalesce(reason, found)).to_series().alias("reason")
    bad = reason.is_not_null()
    if not bad.any():
        return frame, _quarantine(frame.clear(), reason.clear(), rules.key)
    return frame.filter(~bad), _quarantine(frame.filter(bad), reason.filter(bad), rules.key)


def _quarantine(rows: pl.DataFrame, reason: pl.Series, key: tuple[str, ...]) -> pl.DataFrame:
    kept = [name for name in key if name in rows.columns] or rows.columns[:1]
    return rows.select(kept).with_columns(reason.alias("reason"))
