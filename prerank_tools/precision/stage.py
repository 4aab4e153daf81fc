"""`export vectors`: a table of vectors in, packed low-precision rows out, with what they lose measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl

from prerank_tools.precision.fidelity import cosines, neighbour_overlap
from prerank_tools.precision.rows import FOOTER_NAMES, RowFormat, decode, encode
from prerank_tools.stage import Context, Part, Shard, Stage
from prerank_tools.tables.contracts import split_rows
from prerank_tools.tables.table import Table, read_shard, shards_of
from prerank_tools.tables.vectors import numpy_to_vectors, vectors_to_numpy

CHECKED_ROWS = 50_000  # rows that the worst cosine and the neighbours are measured on, evenly spread
QUERIES, NEIGHBOURS = 1000, 10


@dataclass(frozen=True)
class ExportVectors(Stage):
    """Keys and other columns as they are; `embedding` as codes, `scale` and, for uint4, `offset` beside it.

    int8 is an array of int8 values, fp8 and uint4 are packed bytes; the footer names the format.
    """

    name: ClassVar[str] = "export.vectors"
    output: ClassVar[str] = "packed_vectors"

    table: Path
    format: RowFormat = "int8"

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        return {"table": (self.table, _contract(self.table))}

    def params(self) -> Mapping[str, Any]:
        return {"format": self.format}

    def footer(self) -> Mapping[str, Any]:
        return {
            "format": FOOTER_NAMES[self.format],
            "value": "code * scale" + " + offset" * (self.format == "uint4"),
        }

    def plan(self, ctx: Context) -> Sequence[Shard]:
        return shards_of(ctx.table("table"))

    def process(self, shard: Shard, ctx: Context) -> Part:
        table = ctx.table("table")
        rows = read_shard(shard)
        good, bad = split_rows(rows, table.contract)
        x_ND = _values(good)
        packed = encode(x_ND, format=self.format)
        columns = [numpy_to_vectors("embedding", packed.codes_NW), pl.Series("scale", packed.scale_N)]
        if packed.offset_N is not None:
            columns.append(pl.Series("offset", packed.offset_N))
        counts = {"rows_in": len(rows), "cosine_sum": float(cosines(x_ND, decode(packed)).sum())}
        return Part(good.with_columns(columns), bad, counts)

    def quality(self, counts: Mapping[str, float], ctx: Context) -> Mapping[str, Any]:
        x_ND = _sample(ctx.table("table"))
        packed = encode(x_ND, format=self.format)
        y_ND = decode(packed)
        rows = counts["rows_in"] - counts["quarantined"]
        return {
            "format": FOOTER_NAMES[self.format],
            "dims": packed.dim,
            "bytes_a_row": packed.bytes_a_row,
            "mean_cosine": counts["cosine_sum"] / max(rows, 1),
            "min_cosine": float(cosines(x_ND, y_ND).min(initial=1.0)),
            "overlap_at_10": neighbour_overlap(x_ND, y_ND, k=NEIGHBOURS, queries=QUERIES),
            "rows_checked": len(x_ND),
            "queries": min(QUERIES, len(x_ND)),
        }


def _contract(path: Path) -> str:
    """Vectors of users where the first file holds `user_id`, else of items."""
    part = path if path.is_file() else next(iter(sorted(path.glob("**/*.parquet"))), None)
    try:
        users = part is not None and "user_id" in pl.read_parquet_schema(part)
    except pl.exceptions.PolarsError:
        users = False
    return "user_embeddings" if users else "item_embeddings"


def _values(frame: pl.DataFrame) -> np.ndarray:
    x_ND = vectors_to_numpy(frame["embedding"]).astype(np.float32)
    return x_ND * frame["scale"].cast(pl.Float32).to_numpy()[:, None] if "scale" in frame.columns else x_ND


def _sample(table: Table) -> np.ndarray:
    """At most `CHECKED_ROWS` usable rows, evenly spread over the table."""
    columns = [name for name in ("embedding", "scale") if name in table.schema]
    frame = table.scan(columns).gather_every(-(-table.rows // CHECKED_ROWS)).drop_nulls().collect()
    x_ND = _values(frame)
    return x_ND[np.isfinite(x_ND).all(axis=1) & x_ND.any(axis=1)]
