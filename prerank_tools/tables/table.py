"""Open a table or a folder of files: parts, rows, digest, contract, lineage.

A table is a Parquet file, a folder of part files, or a folder that prerank wrote. Parts are always read
from an explicit list, never from a bare directory, and only whole outputs are opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prerank_schemas import CONTRACTS, Contract
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.stage import Shard
from prerank_tools.tables.pages import plain_vectors
from prerank_tools.tables.parquet import read_footer
from prerank_tools.tables.vectors import numpy_to_vectors

SHARD_ROWS = 65_536
KEY_ROWS = 1 << 19  # rows whose keys are read at a time
# Above this size a file is known by its size, footer and modification time instead of all its bytes.
WHOLE_DIGEST_BYTES = 256 << 20
LATEST_SECOND = 100_000_000_000  # the year 5138; milliseconds of today are past it
REMOTE = ("s3://", "gs://", "hdfs://", "abfs://", "http://", "https://", "s3:/", "gs:/", "hdfs:/")


@dataclass(frozen=True)
class Table:
    """One opened input: what it is made of, what it is called in a manifest, and how to read it."""

    path: Path
    contract: str
    parts: tuple[Path, ...]
    part_rows: tuple[int, ...]
    schema: pl.Schema
    digest: str
    stamps: tuple[tuple[str, int, int], ...]  # (path, bytes, mtime_ns) at opening
    manifest: Mapping[str, Any] | None = None
    data_cutoff: int | None = None
    lineage: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows over all parts."""
        return sum(self.part_rows)

    def scan(self, columns: Sequence[str] | None = None) -> pl.LazyFrame:
        """A lazy frame over all parts: ids as Int64 or String, times as Int64 epoch seconds."""
        frame = normalise(pl.scan_parquet(list(self.parts), glob=False), self.contract, self.schema)
        return frame.select(columns) if columns is not None else frame

    def read(self, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """All rows in memory; for small tables and single columns."""
        return self.scan(columns).collect()


def open_table(path: Path, contract: str, *, role: str = "") -> Table:
    """Open a table and hold it against its contract.

    Raises UsageError where there is no such path, ContractError where the table cannot be used: not Parquet,
    empty, a missing column, a wrong type, parts that differ, a duplicate key, milliseconds as seconds.
    """
    rules = CONTRACTS[contract]
    refuse_remote(path)
    manifest, parts = _find_parts(path, role or contract)
    schema = _schema_of(parts, path)
    faults = rules.faults(schema)
    if faults:
        raise ContractError(f"{path}: {faults[0]}", f"a table of {contract} is: {describe(rules)}")
    counted = tuple(_rows_of(part) for part in parts)
    if not sum(counted):
        raise ContractError(f"{path}: the table is empty", f"give {role or contract} with at least one row")
    stamps = tuple(stamp(part) for part in parts)
    table = Table(
        path=path,
        contract=contract,
        parts=parts,
        part_rows=counted,
        schema=schema,
        digest=manifest["content_digest"] if manifest else digest_files(parts),
        stamps=stamps,
        manifest=manifest,
        data_cutoff=manifest.get("data_cutoff") if manifest else None,
        lineage=manifest.get("lineage", {}) if manifest else {},
    )
    check_times(table, rules)
    if manifest is None:
        check_key(table, rules)
    return table


@dataclass(frozen=True)
class Folder:
    """A model folder, or any other file or folder that is not a table."""

    path: Path
    digest: str
    stamps: tuple[tuple[str, int, int], ...]
    manifest: Mapping[str, Any] | None = None
    data_cutoff: int | None = None
    lineage: Mapping[str, str] = field(default_factory=dict)
    contract: str = ""
    rows: int = 0


def open_folder(path: Path, *, role: str = "model") -> Folder:
    """Open a model folder or a file; prerank's own is known by its manifest, another by its bytes."""
    refuse_remote(path)
    if not path.exists():
        raise UsageError(f"{path}: no such {role}", "check the path")
    files = (path,) if path.is_file() else tuple(sorted(p for p in path.rglob("*") if p.is_file()))
    manifest = _read_manifest(path)
    return Folder(
        path=path,
        digest=manifest["content_digest"] if manifest else digest_files(files),
        stamps=tuple(stamp(file) for file in files),
        manifest=manifest,
        data_cutoff=manifest.get("data_cutoff") if manifest else None,
        lineage=manifest.get("lineage", {}) if manifest else {},
    )


def shards_of(table: Table, rows: int = SHARD_ROWS) -> list[Shard]:
    """Number a table's rows as shards, part by part and at most `rows` each."""
    shards: list[Shard] = []
    for part, count in zip(table.parts, table.part_rows, strict=True):
        for offset in range(0, count, rows):
            shards.append(
                Shard(len(shards), str(part), offset, min(rows, count - offset), {"contract": table.contract})
            )
    return shards


def read_shard(shard: Shard, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """The rows of one shard that `shards_of` made, normalised as `Table.scan` does."""
    scan = pl.scan_parquet(shard.path, glob=False)
    schema = scan.collect_schema()
    names = list(schema if columns is None else columns)
    vectors = _plain(shard, {name: schema[name] for name in names if name in schema})
    rest = [name for name in names if name not in vectors]
    if not vectors or not rest:  # a frame of vectors alone would have no rows to hold them against
        vectors, rest = {}, names
    own = pl.Schema({name: schema[name] for name in rest if name in schema})
    frame = normalise(scan.slice(shard.offset, shard.rows).select(rest), shard.extra["contract"], own)
    return frame.collect().with_columns(vectors.values()).select(names)


def _plain(shard: Shard, schema: Mapping[str, pl.DataType]) -> dict[str, pl.Series]:
    """The vector columns of a shard that can be read from their pages."""
    kind, found = CONTRACTS[shard.extra["contract"]].kind_of, {}
    for name, dtype in schema.items():
        if kind(name) == "vector":
            x_ND = plain_vectors(Path(shard.path), name, dtype, shard.offset, shard.rows)
            if x_ND is not None:
                found[name] = numpy_to_vectors(name, x_ND)
    return found


def normalise(frame: pl.LazyFrame, contract: str, schema: pl.Schema) -> pl.LazyFrame:
    """Ids to Int64 or String, times to Int64 epoch seconds, vectors to fixed-size arrays."""
    rules = CONTRACTS[contract]
    casts = []
    for name, dtype in schema.items():
        kind = rules.kind_of(name)
        column = pl.col(name)
        if kind == "id":
            casts.append(column.cast(pl.Int64 if dtype.is_integer() else pl.String))
        elif kind == "ids" and isinstance(dtype, (pl.List, pl.Array)):
            inner = pl.Int64 if dtype.inner.is_integer() else pl.String  # type: ignore[union-attr]
            casts.append(column.cast(pl.List(inner)))
        elif kind == "time":
            casts.append(
                column.dt.epoch("s").cast(pl.Int64) if dtype.is_temporal() else column.cast(pl.Int64)
            )
        elif kind == "text":
            casts.append(column.cast(pl.String))
        elif kind == "vector" and isinstance(dtype, pl.Array) and isinstance(dtype.inner, pl.Float64):
            casts.append(column.cast(pl.Array(pl.Float32, dtype.size)))
        elif kind == "vector" and isinstance(dtype, pl.List):
            inner_type = pl.Float32 if isinstance(dtype.inner, pl.Float64) else dtype.inner
            casts.append(column.cast(pl.List(inner_type)).list.to_array(_list_width(frame, name)))
    return frame.with_columns(casts) if casts else frame


def describe(rules: Contract) -> str:
    """A contract in one line: `item_id (int64 or string), title? (string)`."""
    from prerank_schemas.contract import KINDS

    return ", ".join(f"{c.name}{'?' if c.optional else ''} ({KINDS[c.kind][0]})" for c in rules.columns)


def check_times(table: Table, rules: Contract) -> None:
    """Refuse what is no time: milliseconds in an epoch column, which are the year 50,000, or fill values."""
    for column in rules.columns:
        dtype = table.schema.get(column.name)
        if column.kind != "time" or dtype is None or dtype.is_temporal():
            continue
        time = pl.col(column.name)
        span = table.scan([column.name]).select(time.min().alias("earliest"), time.max().alias("latest"))
        earliest, latest = span.collect().row(0)
        if earliest is not None and earliest < -LATEST_SECOND:
            raise ContractError(
                f"{table.path}: column `{column.name}` reaches {earliest}, which is not epoch seconds",
                "is it a fill value? drop those rows or set them null",
            )
        if latest is not None and latest > LATEST_SECOND:
            raise ContractError(
                f"{table.path}: column `{column.name}` reaches {latest}, which is not epoch seconds",
                f"milliseconds? divide: pl.col('{column.name}') // 1000",
            )


def check_key(table: Table, rules: Contract) -> None:
    """Refuse a key that comes twice, naming the first such row."""
    key = [name for name in rules.key if name in table.schema]
    if not key or len(key) < len(rules.key) or not _may_repeat(table, key):
        return
    keys = table.scan(key).collect()
    # A null in the key is a fault of its row, met later; two of them are not a repeated key.
    repeated = keys.is_duplicated() & ~keys.select(pl.any_horizontal(pl.all().is_null())).to_series()
    if repeated.any():
        row = int(repeated.arg_true()[0])
        value = ", ".join(f"{name} {keys[name][row]!r}" for name in key)
        raise ContractError(
            f"{table.path}: {value} comes more than once (row {row})",
            f"keep one row for each {' and '.join(key)}",
        )


def _may_repeat(table: Table, key: Sequence[str]) -> bool:
    """Whether two rows agree in 64 bits of their key: without such, no key comes twice; 8 bytes a row."""
    word_N, filled = np.empty(table.rows, dtype=np.uint64), 0
    for shard in shards_of(table, KEY_ROWS):
        keys = read_shard(shard, key).drop_nulls()
        alone = len(key) == 1 and keys[key[0]].dtype == pl.Int64
        words = keys[key[0]].to_numpy().view(np.uint64) if alone else keys.hash_rows(0).to_numpy()
        word_N[filled : filled + len(words)] = words
        filled += len(words)
    word_N = word_N[:filled]
    if (word_N[1:] > word_N[:-1]).all():
        return False
    word_N.sort()
    return bool((word_N[1:] == word_N[:-1]).any())


def refuse_remote(path: Path) -> None:
    """Say what to do with an object-store address instead of failing on a strange local path."""
    if str(path).startswith(REMOTE):
        raise UsageError(
            f"{path}: only local and mounted folders are read", "copy it here, or mount the bucket"
        )


def digest_files(files: Sequence[Path]) -> str:
    """sha256 over the files: their bytes, or size, footer and modification time above 256 MB each."""
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        total.update(size.to_bytes(8, "little"))
        total.update(_file_digest(file) if size <= WHOLE_DIGEST_BYTES else _large_file_digest(file))
    return total.hexdigest()


def stamp(file: Path) -> tuple[str, int, int]:
    """What tells that a file was replaced while the run read it."""
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _large_file_digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        stream.seek(-min(file.stat().st_size, 1 << 20), 2)
        tail = stream.read()
    return hashlib.sha256(tail + str(file.stat().st_mtime_ns).encode()).digest()


def _read_manifest(path: Path) -> dict[str, Any] | None:
    if path.is_dir() and (path / "manifest.json").is_file():
        try:
            manifest = json.loads((path / "manifest.json").read_text())
        except ValueError as fault:
            raise ContractError(f"{path}: its manifest is damaged", "write the output again") from fault
        return manifest if "content_digest" in manifest else None
    if path.is_file() and path.suffix == ".parquet":
        return read_footer(path).get("manifest")
    return None


def _find_parts(path: Path, role: str) -> tuple[dict[str, Any] | None, tuple[Path, ...]]:
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder for {role}", "check the path")
    if path.is_file():
        _check_parquet(path)
        return _read_manifest(path), (path,)
    manifest = _read_manifest(path)
    if manifest and "parts" in manifest.get("outputs", {}):
        return manifest, tuple(_checked_part(path, part) for part in manifest["outputs"]["parts"])
    if (path / "shards").is_dir() and not manifest:
        raise ContractError(f"{path}: this output is not finished", "run the command that writes it again")
    folder = path / "data" if (path / "data").is_dir() else path
    parts = tuple(sorted(folder.glob("*.parquet")))
    if not parts:
        inside = sorted(str(path / found.parent.name) for found in path.glob("*/manifest.json"))
        hint = f"one of {', '.join(inside)}?" if inside else "name a Parquet file or a folder of them"
        raise ContractError(f"{path}: no *.parquet files for {role}", hint)
    for part in parts:
        _check_parquet(part)
    return None, parts


def _checked_part(path: Path, part: Mapping[str, Any]) -> Path:
    file = path / part["path"]
    if not file.is_file() or file.stat().st_size != part["bytes"]:
        raise ContractError(
            f"{file}: missing or not the {part['bytes']} bytes that its manifest names",
            f"see `prerank inspect {path} --verify`, then write it again",
        )
    return file


def _check_parquet(path: Path) -> None:
    with path.open("rb") as stream:
        head = stream.read(4)
        stream.seek(0, 2)
        size = stream.tell()
        stream.seek(max(0, size - 4))
        tail = stream.read(4)
    if head != b"PAR1" or tail != b"PAR1" or size < 12:
        raise ContractError(
            f"{path}: not a Parquet file, or cut short", "write it again with any Parquet writer"
        )


def _schema_of(parts: Sequence[Path], path: Path) -> pl.Schema:
    first: pl.Schema | None = None
    for part in parts:
        try:
            schema = pl.Schema(pl.read_parquet_schema(part))
        except (pl.exceptions.PolarsError, OSError) as fault:
            raise ContractError(
                f"{part}: its footer cannot be read ({_one_line(fault)})", "write it again"
            ) from fault
        if first is None:
            first = schema
        elif schema != first:
            differing = next(
                (n for n in {**first, **schema} if first.get(n) != schema.get(n)), "the order of columns"
            )
            raise ContractError(
                f"{part}: `{differing}` is {schema.get(differing)}, in part 0 {first.get(differing)}",
                "write all parts with one schema",
            )
    assert first is not None
    return first


def _rows_of(part: Path) -> int:
    return int(pl.scan_parquet(part, glob=False).select(pl.len()).collect().item())


def _list_width(frame: pl.LazyFrame, name: str) -> int:
    widths = frame.select(pl.col(name).list.len().drop_nulls().unique()).collect()[name].sort().to_list()
    if len(widths) != 1:
        raise ContractError(f"column `{name}` holds vectors of widths {widths[:5]}", "write one width")
    return int(widths[0])


def _one_line(fault: Exception) -> str:
    return str(fault).splitlines()[0] if str(fault) else type(fault).__name__
