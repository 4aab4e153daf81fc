"""Sort a table that does not fit in memory into buckets: scatter it into runs, gather bucket by bucket.

A run is as many rows as memory allows, ordered by bucket, in an uncompressed Arrow file of small batches, of
which a bucket reads the few that hold its slice. So one pass writes all rows once, a second reads them once,
and the memory is that of one run or of the largest bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from prerank_tools.tables.bucketing import bucket_of
from prerank_tools.tables.contracts import split_rows
from prerank_tools.tables.events import sort_rows
from prerank_tools.tables.table import Table, read_shard, shards_of

RUN_ROWS = 1 << 21
BATCH_ROWS = 8192


def scatter(table: Table, folder: Path, *, by: str, buckets: int, run_rows: int = RUN_ROWS) -> None:
    """Write the table's rows as runs under `folder`; rows that break the contract go to `bad-*.arrow`."""
    folder.mkdir(parents=True, exist_ok=True)
    bounds = []
    for number, block in enumerate(_blocks(table, run_rows)):
        rows, bad = split_rows(block, table.contract)
        bucket_N = bucket_of(rows[by], buckets).to_numpy()
        order = np.argsort(bucket_N, kind="stable")
        rows[order].write_ipc(folder / f"run-{number:05d}.arrow", record_batch_size=BATCH_ROWS)
        bounds.append(np.searchsorted(bucket_N[order], np.arange(buckets + 1)))
        if len(bad):
            bad.write_ipc(folder / f"bad-{number:05d}.arrow")
    np.save(folder / "bounds.npy", np.array(bounds, dtype=np.int64))


def gather(folder: Path, bucket: int, *, order: Sequence[str]) -> pl.DataFrame:
    """All rows of one bucket, sorted by `order` and then by the other columns: no order of arrival shows."""
    bounds = np.load(folder / "bounds.npy")
    slices = [
        pl.scan_ipc(folder / f"run-{number:05d}.arrow", glob=False).slice(start, stop - start)
        for number, (start, stop) in enumerate(bounds[:, bucket : bucket + 2])
    ]
    return sort_rows(pl.concat(slices).collect(), order)


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


def _blocks(table: Table, rows: int) -> Iterator[pl.DataFrame]:
    """Blocks of about `rows`, whatever the size of the parts: daily parts may be tiny or huge."""
    held: list[pl.DataFrame] = []
    for shard in shards_of(table, rows):
        if held and sum(map(len, held)) + shard.rows > rows:
            yield pl.concat(held)
            held = []
        held.append(read_shard(shard))
    yield pl.concat(held)
