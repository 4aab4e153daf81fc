"""`export sid`: a table of item SIDs in, the files of another project out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl

from prerank_tools.errors import ContractError
from prerank_tools.export.sid_formats import SidFormat, write_sids
from prerank_tools.quantizers.codebook import load_codebook
from prerank_tools.stage import Context, Stage
from prerank_tools.tables.table import Table, read_shard, shards_of
from prerank_tools.tables.vectors import vectors_to_numpy


@dataclass(frozen=True)
class ExportSid(Stage):
    """The SIDs in one interchange format; the levels' sizes are those of the codebook beside the table."""

    name: ClassVar[str] = "export.sid"
    kind: ClassVar[str] = "files"

    sids: Path
    format: SidFormat = "lcrec"

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        return {"sids": (self.sids, "item_sids")}

    def params(self) -> Mapping[str, Any]:
        return {"format": self.format}

    def build(self, ctx: Context) -> Mapping[str, Any]:
        table = ctx.table("sids")
        return write_sids(self.format, sid_parts(table), ctx.work, sizes=sid_sizes(table))


def sid_parts(table: Table) -> Iterator[tuple[pl.Series, np.ndarray]]:
    """Item ids and codes (N, L) int64 of a SID table, shard by shard; a suffix is the last level."""
    columns = [name for name in ("item_id", "codes", "suffix") if name in table.schema]
    for shard in shards_of(table):
        frame = read_shard(shard, columns)
        codes_NL = vectors_to_numpy(frame["codes"]).astype(np.int64)
        if "suffix" in columns:
            codes_NL = np.column_stack([codes_NL, _suffixes(frame, table)])
        yield frame["item_id"], codes_NL


def sid_sizes(table: Table) -> tuple[int, ...]:
    """Codes a level: of the codebook stored with the table, else one past the largest code in use."""
    folder = table.path / "codebook"
    used = np.max([codes_NL.max(axis=0) for _, codes_NL in sid_parts(table)], axis=0) + 1
    known = load_codebook(folder).sizes if folder.is_dir() else ()
    return tuple(int(size) for size in [*known, *used[len(known) :]])


def _suffixes(frame: pl.DataFrame, table: Table) -> np.ndarray:
    if frame["suffix"].null_count():
        raise ContractError(
            f"{table.path}: `suffix` is null in {frame['suffix'].null_count()} rows",
            "assign all items with one collision policy",
        )
    return frame["suffix"].cast(pl.Int64).to_numpy()
