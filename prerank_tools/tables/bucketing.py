"""Read a table by buckets of one id: which bucket an id belongs to, and the rows of a bucket.

A table that `data partition` wrote holds bucket `b` of `N` in the parts `b`, `b + N`, `b + 2N`, ...: one for
every generation, so a day is appended by adding parts and none is rewritten. A small table that is not
partitioned is bucketed while it is read; a large one is refused with the line that partitions it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl

from prerank_tools.errors import ContractError
from prerank_tools.stage import Shard
from prerank_tools.tables.table import SHARD_ROWS, Table, normalise

UNBUCKETED_ROWS = 4_000_000  # a larger table is partitioned first: each bucket would read all of it
BUCKET_ROWS = 1 << 18  # rows of a bucket where nobody said how many buckets


@dataclass(frozen=True)
class Bucketed:
    """A table read by buckets of `by`; `partitioned` where its files already lie that way."""

    table: Table
    by: str
    buckets: int
    partitioned: bool

    def read(self, bucket: int, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The rows of one bucket, in the order of the files."""
        wanted = None if columns is None else list(columns)
        if self.partitioned:
            parts = self.parts_of(bucket)
            return _scan(parts, self.table.contract, wanted).collect() if parts else self._none(wanted)
        here_N = self._bucket_of_rows() == bucket
        blocks = [
            _scan([part], self.table.contract, wanted)
            .slice(offset, len(mask))
            .filter(pl.lit(pl.Series(mask)))
            .collect()
            for part, offset, mask in self._blocks(here_N)
            if mask.any()
        ]
        return pl.concat(blocks) if blocks else self._none(wanted)

    def parts_of(self, bucket: int) -> list[Path]:
        """The files of one bucket, oldest generation first; of a partitioned table only."""
        return [part for part in self.table.parts if part_number(part) % self.buckets == bucket]

    def shards(self) -> list[Shard]:
        """One shard a bucket, with its rows; `extra` holds the bucket."""
        rows = self.bucket_rows()
        return [
            Shard(bucket, str(self.table.path), 0, rows[bucket], {"bucket": bucket})
            for bucket in range(self.buckets)
        ]

    def bucket_rows(self) -> list[int]:
        """Rows in every bucket."""
        if self.partitioned:
            numbers = [part_number(part) % self.buckets for part in self.table.parts]
            counts = np.bincount(numbers, weights=self.table.part_rows, minlength=self.buckets)
        else:
            bucket_N = self._bucket_of_rows()
            counts = np.bincount(bucket_N[bucket_N >= 0], minlength=self.buckets)
        return [int(count) for count in counts]

    def _bucket_of_rows(self) -> np.ndarray:
        table = self.table
        return _buckets_of(table.parts, table.digest, table.contract, self.by, self.buckets)

    def _blocks(self, mask_N: np.ndarray) -> list[tuple[Path, int, np.ndarray]]:
        blocks, start = [], 0
        for part, rows in zip(self.table.parts, self.table.part_rows, strict=True):
            for offset in range(0, rows, SHARD_ROWS):
                size = min(SHARD_ROWS, rows - offset)
                blocks.append((part, offset, mask_N[start : start + size]))
                start += size
        return blocks

    def _none(self, columns: list[str] | None) -> pl.DataFrame:
        return _scan(self.table.parts[:1], self.table.contract, columns).clear().collect()


def bucketed(table: Table, *, by: str = "user_id", buckets: int | None = None) -> Bucketed:
    """Read `table` by buckets of `by`: its own, or `buckets` of them (None: a number by its rows).

    Raises ContractError, with the line to type, where a large table does not lie in those buckets.
    """
    laid = layout(table)
    if laid is not None and laid[0] == by and buckets in (None, laid[1]):
        return Bucketed(table, by, laid[1], True)
    if table.rows > UNBUCKETED_ROWS:
        raise ContractError(
            f"{table.path}: {table.rows} rows, not in {buckets or 'any'} buckets of `{by}`",
            f"prerank data partition {table.path} --by {by}"
            f"{f' --buckets {buckets}' if buckets else ''}"
            f"{f' --contract {table.contract}' if table.contract != 'events' else ''}"
            f" -o {table.path.stem}_by_{by}/",
        )
    return Bucketed(table, by, buckets or default_buckets(table.rows), False)


def layout(table: Table) -> tuple[str, int] | None:
    """(column, buckets) that the table's files are laid out by, as its manifest says; None without one."""
    found = (table.manifest or {}).get("quality", {}).get("layout")
    return (str(found["by"]), int(found["buckets"])) if found else None


def default_buckets(rows: int, *, bucket_rows: int = BUCKET_ROWS) -> int:
    """A power of two that leaves about `bucket_rows` rows in a bucket; at least 4 for work to spread."""
    return max(4, 1 << max(0, (rows // bucket_rows).bit_length()))


def part_number(part: Path) -> int:
    """The number in `part-00012.parquet`."""
    found = re.search(r"(\d+)\.parquet$", part.name)
    if found is None:
        raise ContractError(f"{part}: a bucketed part has a number in its name", "write the table again")
    return int(found[1])


def bucket_of(ids: pl.Series, buckets: int) -> pl.Series:
    """Bucket 0 .. buckets-1 (UInt32) of every id: splitmix64 of an int64, or of a string's CRC-32.

    Golden: `bucket_of(pl.Series([0, 1, 2]), 1000)` is 535, 465, 110.
    """
    return pl.Series(ids.name, hash_ids(ids) % np.uint64(buckets), dtype=pl.UInt64).cast(pl.UInt32)


def hash_ids(ids: pl.Series) -> np.ndarray:
    """64 well-mixed bits (uint64) for every id; equal ids give equal bits everywhere and always."""
    if ids.null_count():
        raise ContractError(
            f"column `{ids.name}` holds {ids.null_count()} nulls where an id is needed",
            f"drop them first, or see them with: prerank data describe (rows with a null {ids.name})",
        )
    if ids.dtype.is_integer():
        return splitmix64(ids.cast(pl.Int64).to_numpy().view(np.uint64))
    # Hashing each distinct string once: a log repeats its users. polars' own hash changes between versions.
    text = ids.cast(pl.String)
    names = text.unique()
    words = np.fromiter((zlib.crc32(name.encode()) for name in names), np.uint64, len(names))
    order = pl.DataFrame({"name": names, "word": splitmix64(words)})
    joined = text.to_frame("name").join(order, on="name", how="left", maintain_order="left")
    return joined["word"].to_numpy()


def splitmix64(words: np.ndarray) -> np.ndarray:
    """The finaliser of Steele, Lea and Flood (OOPSLA 2014): uint64 -> uint64, a bijection."""
    with np.errstate(over="ignore"):
        z = words.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


@lru_cache(maxsize=8)
def _buckets_of(parts: tuple[Path, ...], digest: str, contract: str, by: str, buckets: int) -> np.ndarray:
    """Bucket of every row, -1 where it has no id; kept, because each bucket of a small table asks for it."""
    ids = _scan(parts, contract, [by]).collect()[by]
    bucket_N = np.full(len(ids), -1, dtype=np.int32)
    bucket_N[ids.is_not_null().to_numpy()] = bucket_of(ids.drop_nulls(), buckets).to_numpy()
    return bucket_N


def _scan(parts: Sequence[Path], contract: str, columns: Sequence[str] | None) -> pl.LazyFrame:
    frame = pl.scan_parquet(list(parts), glob=False)
    frame = normalise(frame, contract, frame.collect_schema())
    return frame if columns is None else frame.select(columns)
