"""The mapped rows of `quantize sid`, read part by part: a reduce holds 8 bytes a row of what it asks for."""
# N rows over all parts, n of one part, L levels, R rows asked for

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from prerank_tools.quantizers.sid_keys import pack_codes


@dataclass(frozen=True)
class Mapped:
    """What the map left: item_id, key (codes as one integer), error_1 .. error_L, vector_hash, content."""

    parts: Sequence[Path]
    starts: Sequence[int]  # first row of every part, and the number of rows at the end

    @staticmethod
    def of(parts: Sequence[Path]) -> Mapped:
        """Count the rows of every part."""
        rows = [pl.scan_parquet(part, glob=False).select(pl.len()).collect().item() for part in parts]
        return Mapped(parts, [0, *np.cumsum(rows, dtype=int).tolist()])

    @property
    def rows(self) -> int:
        """N."""
        return self.starts[-1]

    def has(self, column: str) -> bool:
        """Whether the parts hold a column."""
        return column in pl.read_parquet_schema(self.parts[0])

    def read(self, *columns: str) -> Iterator[tuple[slice, pl.DataFrame]]:
        """(its rows among all, the columns) of every part, in order."""
        for part, start, end in zip(self.parts, self.starts, self.starts[1:], strict=False):
            yield slice(start, end), pl.read_parquet(part, columns=list(columns), glob=False)

    def column(self, name: str, dtype: type) -> np.ndarray:
        """One whole column of numbers (N,)."""
        values_N: np.ndarray = np.empty(self.rows, dtype=dtype)
        for at, frame in self.read(name):
            values_N[at] = frame[name].to_numpy()
        return values_N

    def ids(self, rows_R: np.ndarray) -> pl.Series:
        """The item ids of some rows, which are in ascending order."""
        found = []
        for at, frame in self.read("item_id"):
            low, high = np.searchsorted(rows_R, [at.start, at.stop])
            found.append(frame["item_id"].gather(rows_R[low:high] - at.start))
        return pl.concat(found)

    def places(self, wanted_N: np.ndarray) -> np.ndarray:
        """(N,) int64 in the order of the wanted rows' ids (whole numbers are themselves), 0 for others."""
        rows_R = np.flatnonzero(wanted_N)
        ids = self.ids(rows_R)
        place_N = np.zeros(self.rows, dtype=np.int64)
        if ids.dtype.is_integer():
            place_N[rows_R] = ids.to_numpy()
        else:
            place_N[rows_R[ids.arg_sort().to_numpy()]] = np.arange(len(rows_R))
        return place_N


def mapped_frame(
    kept: pl.DataFrame, codes_NL: np.ndarray, sizes: Sequence[int], error_NL: np.ndarray, hash_N: np.ndarray
) -> pl.DataFrame:
    """One mapped part; `kept` holds item_id and, where the items have it, content_hash."""
    columns = [
        pl.Series("key", pack_codes(codes_NL, sizes)),
        *(pl.Series(f"error_{level + 1}", error_N) for level, error_N in enumerate(error_NL.T)),
        pl.Series("vector_hash", hash_N),
    ]
    if "content_hash" in kept.columns:
        columns.append(kept["content_hash"].hash().alias("content"))
    return kept.select("item_id").with_columns(columns)
