"""Sort a table that does not fit in memory into buckets: scatter it into runs, gather bucket by bucket.

One pass writes all rows once as runs (`tables/spill.py`), a second reads them once, and the memory is that of
one run or of the largest bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from prerank_tools.tables.bucketing import bucket_of
from prerank_tools.tables.contracts import split_rows
from prerank_tools.tables.events import sort_rows
from prerank_tools.tables.spill import BATCH_ROWS, Spill, blocks_of, spilled
from prerank_tools.tables.table import Table, read_shard, shards_of

RUN_ROWS = 1 << 21


def scatter(table: Table, folder: Path, *, by: str, buckets: int, run_rows: int = RUN_ROWS) -> None:
    """Write the table's rows as runs under `folder`; rows that break the contract go to `bad-*.arrow`."""
    runs = Spill(folder, by=by, buckets=buckets)
    for number, block in enumerate(blocks_of(table, rows=run_rows)):
        rows, bad = split_rows(block, table.contract)
        runs.add(rows)
        if len(bad):
            bad.write_ipc(folder / f"bad-{number:05d}.arrow")
    runs.close()


def gather(folder: Path, bucket: int, *, order: Sequence[str]) -> pl.DataFrame:
    """All rows of one bucket, sorted by `order` and then by the other columns: no order of arrival shows."""
    return sort_rows(spilled(folder, bucket), order)


def gather_bad(folder: Path) -> pl.DataFrame | None:
    """The rows that broke the contract, with their reasons; None where there are none."""
    files = sorted(folder.glob("bad-*.arrow"))
    return pl.concat([pl.read_ipc(file) for file in files]) if files else None


def memory_of(table: Table, *, by: str, buckets: int) -> int:
    """Bytes of anonymous memory that sorting `table` takes; the factors are measured ones, within a fifth."""
    counts = np.zeros(buckets, dtype=np.int64)
    for shard in shards_of(table, RUN_ROWS):
        ids = read_shard(shard, [by])[by].drop_nulls()
        counts += np.bincount(bucket_of(ids, buckets).to_numpy(), minlength=buckets)
    sample = table.scan().head(BATCH_ROWS).collect()
    row, run = sample.estimated_size() / len(sample), min(table.rows, RUN_ROWS)
    kept = 1.8 * run if table.rows > RUN_ROWS else 0  # what the allocator keeps once a run has passed
    return int((56 << 20) + row * max(3.5 * run, kept + 10 * int(counts.max())))
