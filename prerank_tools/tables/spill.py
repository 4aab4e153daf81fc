"""Bucket rows once while a job runs: blocks of rows in, one bucket at a time out, in bounded memory.

A run is one block ordered by bucket, in an uncompressed Arrow file of small batches, of which a bucket reads
the few that hold its slice: all rows are written once and read once, however many buckets there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from prerank_tools.tables.bucketing import bucket_of
from prerank_tools.tables.table import Table, read_shard, shards_of

BLOCK_ROWS = 1 << 19  # rows of a run
BATCH_ROWS = 8192


class Spill:
    """Runs being written under a folder; rows of one bucket keep the order in which they came."""

    def __init__(self, folder: Path, *, by: str, buckets: int) -> None:
        self.folder, self.by, self.buckets = folder, by, buckets
        self._bounds: list[np.ndarray] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, rows: pl.DataFrame) -> None:
        """Write one block as a run; `by` holds no null."""
        bucket_N = bucket_of(rows[self.by], self.buckets).to_numpy()
        order = np.argsort(bucket_N, kind="stable")
        name = f"run-{len(self._bounds):05d}.arrow"
        rows[order].write_ipc(self.folder / name, record_batch_size=BATCH_ROWS)
        self._bounds.append(np.searchsorted(bucket_N[order], np.arange(self.buckets + 1)))

    def close(self) -> None:
        """Note where each bucket lies; without it nothing can be read."""
        np.save(self.folder / "bounds.npy", np.array(self._bounds, dtype=np.int64))


def spill(blocks: Iterable[pl.DataFrame], folder: Path, *, by: str, buckets: int) -> None:
    """Write blocks as the runs of one `Spill`."""
    runs = Spill(folder, by=by, buckets=buckets)
    for block in blocks:
        runs.add(block)
    runs.close()


def spilled(folder: Path, bucket: int) -> pl.DataFrame:
    """All rows of one bucket, in the order in which they were written."""
    return pl.concat([piece for piece, _ in _slices(folder, bucket)]).collect()


def spilled_blocks(folder: Path, bucket: int, *, rows: int) -> Iterator[pl.DataFrame]:
    """The same in blocks of about `rows`, at least one: a bucket may hold one id of any size."""
    held: list[pl.LazyFrame] = []
    count = 0
    for piece, size in _slices(folder, bucket):
        held.append(piece)
        count += size
        if count >= rows:
            yield pl.concat(held).collect()
            held, count = [], 0
    if held:
        yield pl.concat(held).collect()


def _slices(folder: Path, bucket: int) -> list[tuple[pl.LazyFrame, int]]:
    """What each run holds of a bucket, and its rows."""
    bounds = np.load(folder / "bounds.npy")
    return [
        (pl.scan_ipc(folder / f"run-{number:05d}.arrow", glob=False).slice(start, stop - start), stop - start)
        for number, (start, stop) in enumerate(bounds[:, bucket : bucket + 2])
        if stop > start or not number
    ]


def blocks_of(
    table: Table, columns: Sequence[str] | None = None, *, rows: int = BLOCK_ROWS
) -> Iterator[pl.DataFrame]:
    """Blocks of about `rows`, whatever the size of the parts: daily parts may be tiny or huge."""
    held: list[pl.DataFrame] = []
    for shard in shards_of(table, rows):
        if held and sum(map(len, held)) + shard.rows > rows:
            yield pl.concat(held)
            held = []
        held.append(read_shard(shard, columns))
    yield pl.concat(held)


def blocks_of_requests(table: Table, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Blocks of requests that hold some `BLOCK_ROWS` candidates each."""
    rows = BLOCK_ROWS
    if "candidates" in table.schema:
        listed = table.scan(["candidates"]).head(1024).select(pl.col("candidates").list.len().mean())
        rows = max(1, int(BLOCK_ROWS / max(1.0, listed.collect().item() or 1.0)))
    return blocks_of(table, columns, rows=rows)
