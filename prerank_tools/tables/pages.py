"""Vectors straight from the pages of a Parquet file, where they lie as plain bytes one after another.

A column of fixed-size arrays carries levels that say, value by value, where each vector begins; a general
reader spends most of its time on them. Here they are compared with what whole, non-null vectors of one width
have, and the values are read into place. Anything else (compression, a dictionary, nulls, another page
version) is left to the general reader. Format: Apache Parquet, `parquet.thrift` and "Encodings".
"""
# N rows, D dims

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

HEADER_BYTES = 512  # of a page: two dozen, and statistics
PLAIN, RLE, UNCOMPRESSED, DATA_PAGE = 0, 3, 0, 0
# Physical type and bytes of a value as they must stand in the file.
STORED: dict[Any, tuple[int, int]] = {pl.Float32: (4, 4), pl.Float16: (7, 2)}


def plain_vectors(path: Path, column: str, dtype: pl.DataType, offset: int, rows: int) -> np.ndarray | None:
    """Rows from `offset` on of an `Array(Float32 | Float16, D)` column as x_ND; None where not plain."""
    stored = STORED.get(type(dtype.inner)) if isinstance(dtype, pl.Array) else None
    if stored is None or not isinstance(dtype, pl.Array) or dtype.size == 0 or rows == 0:
        return None
    status = path.stat()
    try:
        chunks = _chunks(str(path), status.st_size, status.st_mtime_ns, column, *stored)
    except (LookupError, ValueError, struct.error):  # a damaged footer: the general reader says so
        return None
    x_ND = np.empty((rows, dtype.size), dtype=np.float32 if stored[1] == 4 else np.float16)
    with path.open("rb", buffering=0) as file:
        filled = _fill(file.fileno(), chunks, x_ND, offset)
    return x_ND if filled else None


@dataclass(frozen=True)
class _Chunk:
    """One row group of the column: where its pages lie, its rows, the definition level of a whole value."""

    start: int
    end: int
    rows: int
    depth: int


def _fill(file: int, chunks: tuple[_Chunk, ...], x_ND: np.ndarray, offset: int) -> bool:
    """Read the rows from `offset` on into `x_ND`; False where a page is not as simple as hoped."""
    first, done = 0, 0
    for chunk in chunks:
        if done < len(x_ND) and first + chunk.rows > offset + done:
            taken = _fill_chunk(file, chunk, x_ND[done:], offset + done - first)
            if taken == 0:
                return False
            done += taken
        first += chunk.rows
    return done == len(x_ND)


def _fill_chunk(file: int, chunk: _Chunk, x_ND: np.ndarray, skip: int) -> int:
    """As many rows of one row group, without the first `skip`, as there are and as fit; 0 where not plain."""
    at, row, done, width = chunk.start, 0, 0, x_ND.shape[1]
    wanted = min(len(x_ND), chunk.rows - skip)
    while done < wanted and at < chunk.end:
        head = os.pread(file, HEADER_BYTES, at)
        page = _page(head)
        if page is None or page.values % width:
            return 0
        rows = page.values // width
        if row + rows > skip + done:
            levels = page.levels_end(file, at, width, chunk.depth)
            if not levels or levels + rows * x_ND.strides[0] != page.size:
                return 0
            begin = skip + done - row
            take = min(rows - begin, wanted - done)
            target = x_ND[done : done + take]
            place = at + page.header + levels + begin * x_ND.strides[0]
            view: Any = target  # NumPy's stubs do not say that arrays are buffers
            if os.preadv(file, [memoryview(view).cast("B")], place) != target.nbytes:
                return 0
            done += take
        row += rows
        at += page.header + page.size
    return done if done == wanted else 0


@dataclass(frozen=True)
class _Page:
    header: int  # bytes
    size: int  # bytes after the header
    values: int

    def levels_end(self, file: int, at: int, width: int, depth: int) -> int:
        """Bytes of the levels before the values; 0 where some vector is not whole."""
        end = 0
        for period, level in ((width, 1), (0, depth)):  # where vectors begin; how deep values are defined
            (size,) = struct.unpack("<I", os.pread(file, 4, at + self.header + end))
            if size > self.size:
                return 0
            levels = os.pread(file, size, at + self.header + end + 4)
            if not _periodic(levels, self.values, period, level):
                return 0
            end += 4 + size
        return end


def _page(head: bytes) -> _Page | None:
    """A data page of plain values behind RLE levels, from its header."""
    try:
        fields, length = read_struct(head)
    except (IndexError, ValueError, struct.error):  # longer than what was read: not one of ours
        return None
    data = fields.get(5)
    if fields.get(1) != DATA_PAGE or data is None or fields[2] != fields[3]:
        return None
    if (data[2], data[3], data[4]) != (PLAIN, RLE, RLE):
        return None
    return _Page(length, fields[3], data[1])


@lru_cache(maxsize=64)
def _periodic(levels: bytes, count: int, period: int, level: int) -> bool:
    """Whether `count` hybrid-coded levels are `level`, but 0 at each start of a period where there is one.

    Pages of one width repeat these bytes, so nearly all of them are answered from the cache.
    """
    bits = level.bit_length()
    values, at = [], 0
    while at < len(levels):
        head, at = _varint(levels, at)
        if head & 1:
            packed = np.frombuffer(levels[at : at + (head >> 1) * bits], dtype=np.uint8)
            bit_8 = np.unpackbits(packed, bitorder="little").reshape(-1, bits)
            values.append((bit_8 << np.arange(bits)).sum(axis=1).astype(np.uint8))
            at += (head >> 1) * bits
        else:
            values.append(np.full(head >> 1, levels[at], dtype=np.uint8))
            at += 1
    found = np.concatenate(values)[:count] if values else np.zeros(0, np.uint8)
    expected = np.full(count, level, dtype=np.uint8)
    if period:
        expected[::period] = 0
    return np.array_equal(found, expected)


@lru_cache(maxsize=16)
def _chunks(path: str, size: int, changed: int, column: str, kind: int, width: int) -> tuple[_Chunk, ...]:
    """The column's row groups, none where it is stored otherwise; kept, since each shard of a file asks."""
    with Path(path).open("rb") as file:
        file.seek(size - 8)
        (length,) = struct.unpack("<I", file.read(4))
        file.seek(size - 8 - length)
        footer, _ = read_struct(file.read(length))
    leaf, depth = _leaf(footer[2], column, kind, width)
    if leaf < 0:
        return ()
    chunks = []
    for group in footer[4]:
        meta = group[1][leaf][3]
        if meta[4] != UNCOMPRESSED or 11 in meta:  # 11: a dictionary page
            return ()
        chunks.append(_Chunk(meta[9], meta[9] + meta[7], group[3], depth))
    return tuple(chunks)


def _leaf(schema: list[dict[int, Any]], column: str, kind: int, width: int) -> tuple[int, int]:
    """(place among the leaves, definition depth) of a list of numbers of one kind; (-1, 0) where not one."""
    leaf, node = 0, 1
    while node < len(schema):
        size = _subtree(schema, node)
        if schema[node][4] == column.encode():
            branch = schema[node : node + size]
            typed = branch[-1].get(1), branch[-1].get(2, width)
            if size != 3 or typed != (kind, width) or branch[1].get(3) != 2:
                return -1, 0
            return leaf, sum(element[3] != 0 for element in branch)
        leaf += sum(not element.get(5) for element in schema[node : node + size])
        node += size
    return -1, 0


def _subtree(schema: list[dict[int, Any]], node: int) -> int:
    """Nodes of the tree below and with one, in the depth-first order of a footer."""
    size = 1
    for _ in range(schema[node].get(5) or 0):
        size += _subtree(schema, node + size)
    return size


def read_struct(buffer: bytes, at: int = 0) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol as {field id: value}, and where it ends."""
    fields: dict[int, Any] = {}
    field = 0
    while True:
        head = buffer[at]
        at += 1
        if head == 0:
            return fields, at
        if head >> 4:
            field += head >> 4
        else:
            field, at = _zigzag(buffer, at)
        fields[field], at = (head & 15 == 1, at) if head & 15 in (1, 2) else _value(buffer, at, head & 15)


def _value(buffer: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2, 3):  # in a list, booleans take a byte each
        return buffer[at], at + 1
    if kind in (4, 5, 6):
        return _zigzag(buffer, at)
    if kind == 7:
        return struct.unpack("<d", buffer[at : at + 8])[0], at + 8
    if kind == 8:
        size, at = _varint(buffer, at)
        return buffer[at : at + size], at + size
    if kind in (9, 10):
        return _list(buffer, at)
    if kind == 12:
        return read_struct(buffer, at)
    raise ValueError(f"compact type {kind}")


def _list(buffer: bytes, at: int) -> tuple[list[Any], int]:
    size, kind = buffer[at] >> 4, buffer[at] & 15
    at += 1
    if size == 15:
        size, at = _varint(buffer, at)
    values = []
    for _ in range(size):
        value, at = _value(buffer, at, kind)
        values.append(value)
    return values, at


def _varint(buffer: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _zigzag(buffer: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(buffer, at)
    return (value >> 1) ^ -(value & 1), at
