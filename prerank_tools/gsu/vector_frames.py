"""Item vectors by id: a small table is held in memory, a large one is mapped from a file of the run."""
# V items of the catalogue, U wanted items, D dims

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prerank_tools.tables.bucketing import hash_ids
from prerank_tools.tables.contracts import split_rows
from prerank_tools.tables.table import Table, read_shard, shards_of
from prerank_tools.tables.vectors import vectors_to_numpy

MAPPED_BYTES = 256 << 20  # a larger table is mapped: every worker would hold its own copy
SORT_BITS = 8  # keys are sorted by runs of equal first bits, so that no more than 1/256 is sorted at once


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of items by id, as stored: float32, float16 or int8 (its row scale cancels in a cosine)."""

    keys_V: np.ndarray  # sorted
    rows_V: np.ndarray
    table_VD: np.ndarray
    seed: int = -1

    def gather(self, items: pl.Series) -> tuple[np.ndarray, np.ndarray]:
        """(vectors of those items that have one, row of each item in it or -1)."""
        key_U = _keys(items, self.seed)
        if not len(self.keys_V):
            return self.table_VD[:0], np.full(len(items), -1, dtype=np.int64)
        order = np.argsort(key_U, kind="stable")
        at_U = np.empty(len(items), dtype=np.int64)
        at_U[order] = np.minimum(np.searchsorted(self.keys_V, key_U[order]), len(self.keys_V) - 1)
        known_U = self.keys_V[at_U] == key_U
        wanted = self.rows_V[at_U[known_U]].astype(np.int64)
        row_U = np.full(len(items), -1, dtype=np.int64)
        # Read in the order of the file: a mapped table is met page by page, not at random.
        by_place = np.argsort(wanted, kind="stable")
        row_U[np.flatnonzero(known_U)[by_place]] = np.arange(len(wanted))
        return np.ascontiguousarray(self.table_VD[wanted[by_place]]), row_U


def held_vectors(ids: pl.Series, x_VD: np.ndarray) -> ItemVectors:
    """Vectors that are in memory already, one an id."""
    seed = _seed_for(ids)
    key_V = _keys(ids, seed)
    order = np.argsort(key_V, kind="stable")
    return ItemVectors(key_V[order], order, x_VD, seed)


def read_vectors(table: Table) -> tuple[ItemVectors, pl.DataFrame]:
    """A table of embeddings in memory, and its unusable rows with the reason."""
    good, bad = split_rows(table.read(["item_id", "embedding"]), table.contract)
    return held_vectors(good["item_id"], vectors_to_numpy(good["embedding"])), bad


def is_large(table: Table) -> bool:
    """Whether the vectors of a table are mapped instead of held."""
    return table.rows * row_bytes(table) > MAPPED_BYTES


def map_vectors(table: Table, folder: Path) -> None:
    """Write a table of embeddings as three flat files to be mapped: vectors, sorted keys of ids, their rows.

    Memory stays at one shard of the table and 1/256 of the keys, whatever the size of the catalogue.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seed = _seed_for(table.scan(["item_id"]).head(0).collect()["item_id"])
    rows, dtype, width, bad = 0, "", 0, []
    with (folder / "vectors.bin").open("wb") as vectors:
        for ids, x_ND, reasons in _parts(table):
            vectors.write(x_ND.tobytes())
            _spill(folder, _keys(ids, seed), rows, fresh=rows == 0)
            rows, dtype, width = rows + len(ids), str(x_ND.dtype), x_ND.shape[1]
            bad += reasons
    _merge(folder)
    record = {"rows": rows, "dtype": dtype, "width": width, "seed": seed, "bad": bad}
    (folder / "vectors.json").write_text(json.dumps(record, ensure_ascii=False))


def open_mapped(folder: Path) -> tuple[ItemVectors, pl.DataFrame]:
    """What `map_vectors` wrote, mapped read-only, and the unusable rows it met."""
    record = json.loads((folder / "vectors.json").read_text())
    shape = (record["rows"], record["width"])
    vectors = ItemVectors(
        keys_V=np.memmap(folder / "keys.bin", np.uint64, "r", shape=shape[:1]),
        rows_V=np.memmap(folder / "rows.bin", np.uint64, "r", shape=shape[:1]),
        table_VD=np.memmap(folder / "vectors.bin", record["dtype"], "r", shape=shape),
        seed=record["seed"],
    )
    return vectors, pl.DataFrame(record["bad"], schema=["item_id", "reason"], orient="row")


def _parts(table: Table) -> Iterator[tuple[pl.Series, np.ndarray, list[Any]]]:
    for shard in shards_of(table):
        good, bad = split_rows(read_shard(shard, ["item_id", "embedding"]), table.contract)
        yield good["item_id"], vectors_to_numpy(good["embedding"]), [list(row) for row in bad.iter_rows()]


def _spill(folder: Path, key_N: np.ndarray, first: int, *, fresh: bool) -> None:
    """Append (key, row) pairs to the file of their first bits."""
    pairs = np.stack([key_N, np.arange(first, first + len(key_N), dtype=np.uint64)], axis=1)
    run_N = (key_N >> np.uint64(64 - SORT_BITS)).astype(np.int64)
    pairs = pairs[np.argsort(run_N, kind="stable")]
    ends = np.cumsum(np.bincount(run_N, minlength=1 << SORT_BITS))
    for run, end in enumerate(ends):
        start = ends[run - 1] if run else 0
        with (folder / f"run-{run:03d}.bin").open("wb" if fresh else "ab") as stream:
            stream.write(pairs[start:end].tobytes())


def _merge(folder: Path) -> None:
    with (folder / "keys.bin").open("wb") as keys, (folder / "rows.bin").open("wb") as rows:
        for path in sorted(folder.glob("run-*.bin")):
            pairs = np.fromfile(path, np.uint64).reshape(-1, 2)
            pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
            keys.write(pairs[:, 0].tobytes())
            rows.write(pairs[:, 1].tobytes())
            path.unlink()


def _seed_for(ids: pl.Series) -> int:
    """-1: whole numbers mix without collision; strings take polars' own 64-bit hash, within one run only."""
    return -1 if ids.dtype.is_integer() else 20251222


def _keys(ids: pl.Series, seed: int) -> np.ndarray:
    return hash_ids(ids) if seed < 0 else ids.cast(pl.String).hash(seed).to_numpy()


def row_bytes(table: Table) -> int:
    """Bytes of one stored vector."""
    dtype = table.scan(["embedding"]).collect_schema()["embedding"]
    assert isinstance(dtype, pl.Array)
    sizes = {pl.Float32: 4, pl.Float16: 2, pl.Int8: 1}
    return dtype.size * next((size for kind, size in sizes.items() if dtype.inner == kind), 4)
