"""What is in a table and what is wrong with it, in numbers."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from prerank_schemas import CONTRACTS
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.tables.contracts import split_rows
from prerank_tools.tables.parquet import read_faults, read_footer
from prerank_tools.tables.table import Table, open_table, read_shard, shards_of

# Told apart by the columns that only one contract has, most telling first.
TELLING = (
    ("candidates", "requests"),
    ("codes", "item_sids"),
    ("simtier", "gsu_topk"),
    ("score", "scores"),
    ("embedding", "item_embeddings"),
    ("query_text", "pairs"),
    ("user_id", "events"),
    ("item_id", "items"),
)


def validate(path: Path, contract: str = "", *, max_bad: float = 0.001) -> dict[str, Any]:
    """Hold a table against its contract: its columns, its key, its times, and every row.

    Raises ContractError at a fault of the table, or where more than `max_bad` of the rows are at fault.
    """
    with read_faults(str(path)):
        return _validate(open_as(path, contract), max_bad)


def describe(path: Path, contract: str = "") -> dict[str, Any]:
    """Rows, bytes, columns with their types and nulls, the time span, and how rows spread over ids."""
    with read_faults(str(path)):
        return _describe(open_as(path, contract))


def open_as(path: Path, contract: str = "") -> Table:
    """Open a table by the contract named, by the one its writer noted, or by the one its columns tell."""
    if contract and contract not in CONTRACTS:
        raise UsageError(f"no contract `{contract}`", f"one of {', '.join(CONTRACTS)}")
    return open_table(path, contract or _noted(path) or _told(path))


def _validate(table: Table, max_bad: float) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    for shard in shards_of(table):
        rows = read_shard(shard)
        good, bad = split_rows(rows, table.contract)
        reasons.update(bad["reason"])
        reasons.update(_uneven(good))
    faulty = sum(reasons.values())
    if faulty > max_bad * table.rows:
        reason, rows_at_fault = reasons.most_common(1)[0]
        raise ContractError(
            f"{table.path}: {faulty} of {table.rows} rows are unusable, mostly: {reason} ({rows_at_fault})",
            f"mend them, or allow them: --max-bad {faulty / table.rows:.3g}",
        )
    return {"contract": table.contract, "rows": table.rows, "rows_bad": faulty, "reasons": dict(reasons)}


def _describe(table: Table) -> dict[str, Any]:
    nulls = table.scan().select(pl.all().null_count()).collect().row(0, named=True)
    found: dict[str, Any] = {
        "contract": table.contract,
        "rows": table.rows,
        "parts": len(table.parts),
        "bytes": sum(size for _, size, _ in table.stamps),
        "columns": {name: str(dtype) for name, dtype in table.schema.items()},
        "nulls": {name: count for name, count in nulls.items() if count},
    }
    for name in ("timestamp", "as_of", "ingested_at"):
        if name in table.schema:
            found[name] = _span(table, name)
    for name in ("user_id", "item_id", "action"):
        if name in table.schema:
            found[name] = _spread(table, name)
    if "candidates" in table.schema:
        found["candidates"] = _lengths(table)
    return found


def _noted(path: Path) -> str:
    part = path if path.is_file() else next(iter(sorted(path.glob("**/data/part-*.parquet"))), None)
    try:
        return str(read_footer(part).get("schema", "")) if part else ""
    except (pl.exceptions.PolarsError, OSError):
        return ""  # not Parquet: opening it says so


def _told(path: Path) -> str:
    part = path if path.is_file() else next(iter(sorted(path.glob("**/*.parquet"))), None)
    try:
        columns = pl.read_parquet_schema(part) if part else {}
    except (pl.exceptions.PolarsError, OSError):
        columns = {}
    return next((contract for column, contract in TELLING if column in columns), "events")


def _uneven(rows: pl.DataFrame) -> list[str]:
    """One reason a row whose labels are not as many as its candidates."""
    labels = [name for name in rows.columns if name.startswith("label_")]
    if "candidates" not in rows.columns or not labels:
        return []
    wrong = pl.any_horizontal(pl.col(name).list.len() != pl.col("candidates").list.len() for name in labels)
    return ["labels and candidates differ in number"] * rows.filter(wrong).height


def _span(table: Table, name: str) -> dict[str, str]:
    column = pl.col(name)
    first, last = table.scan([name]).select(first=column.min(), last=column.max()).collect().row(0)
    return {
        end: f"{datetime.fromtimestamp(time, UTC):%Y-%m-%dT%H:%M:%S}"
        for end, time in (("first", first), ("last", last))
        if time is not None
    }


def _spread(table: Table, name: str) -> dict[str, Any]:
    """How many ids, and how many rows the usual, the busy and the busiest of them have."""
    rows = table.scan([name]).group_by(name).agg(rows=pl.len()).collect()["rows"].sort(descending=True)
    return {
        "distinct": len(rows),
        "median_rows": int(rows.median() or 0),  # type: ignore[arg-type]
        "p99_rows": int(rows.quantile(0.99) or 0),
        "most_rows": int(rows[0]),
        "share_of_busiest": round(int(rows[0]) / table.rows, 6),
    }


def _lengths(table: Table) -> dict[str, float]:
    length = pl.col("candidates").list.len()
    found = table.scan(["candidates"]).select(least=length.min(), mean=length.mean(), most=length.max())
    return {name: float(value) for name, value in found.collect().row(0, named=True).items()}
