"""What a table must hold: columns by kind, a key, and the rules a row can break."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import polars as pl

INTEGERS = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32)
STRINGS = (pl.String, pl.Categorical, pl.Enum)
VECTOR_ITEMS = (pl.Float16, pl.Float32, pl.Float64, pl.Int8)


def _is_id(dtype: pl.DataType) -> bool:
    return isinstance(dtype, (*INTEGERS, *STRINGS))


def _is_vector(dtype: pl.DataType) -> bool:
    return isinstance(dtype, (pl.Array, pl.List)) and isinstance(dtype.inner, VECTOR_ITEMS)


def _is_codes(dtype: pl.DataType) -> bool:
    return isinstance(dtype, (pl.Array, pl.List)) and isinstance(dtype.inner, INTEGERS)


def _is_ids(dtype: pl.DataType) -> bool:
    return isinstance(dtype, (pl.Array, pl.List)) and _is_id(dtype.inner)  # type: ignore[arg-type]


def _is_numbers(dtype: pl.DataType) -> bool:
    return isinstance(dtype, (pl.Array, pl.List)) and dtype.inner.is_numeric()  # type: ignore[union-attr]


def _is_texts(dtype: pl.DataType) -> bool:
    return isinstance(dtype, (pl.Array, pl.List)) and isinstance(dtype.inner, STRINGS)


def _is_time(dtype: pl.DataType) -> bool:
    return isinstance(dtype, (pl.Int64, pl.Int32, pl.UInt32, pl.Datetime, pl.Date))


# kind -> (what an error message calls it, the test on the dtype)
KINDS: dict[str, tuple[str, Callable[[pl.DataType], bool]]] = {
    "id": ("int64 or string", _is_id),
    "time": ("epoch seconds or a datetime", _is_time),
    "text": ("string", lambda dtype: isinstance(dtype, STRINGS)),
    "bytes": ("binary", lambda dtype: isinstance(dtype, pl.Binary)),
    "number": ("a number", lambda dtype: dtype.is_numeric() or isinstance(dtype, pl.Boolean)),
    "vector": ("a fixed-size array of float32, float16 or int8", _is_vector),
    "codes": ("an array of integers", _is_codes),
    "ids": ("a list of ids", _is_ids),
    "numbers": ("a list of numbers", _is_numbers),
    "texts": ("a list of strings", _is_texts),
    "any": ("any type", lambda dtype: True),
}


@dataclass(frozen=True)
class Column:
    """One column: its kind, whether it may be absent, and whether a null in it is a fault of the row."""

    name: str
    kind: str
    optional: bool = False
    nullable: bool = False
    about: str = ""


@dataclass(frozen=True)
class Contract:
    """One table: columns, the key that must be unique, groups of columns of which one must be there.

    `prefixed` maps a column prefix to a kind (`label_` -> numbers): any number of such columns may come.
    Columns that no rule names are kept as they are.
    """

    name: str
    about: str
    columns: tuple[Column, ...]
    version: int = 1
    key: tuple[str, ...] = ()
    one_of: tuple[tuple[str, ...], ...] = ()
    prefixed: dict[str, str] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> dict[str, Column]:
        """Columns by name."""
        return {column.name: column for column in self.columns}

    def kind_of(self, name: str) -> str | None:
        """Kind of a column by its name or its prefix; None for a column the contract does not speak of."""
        if name in self.by_name:
            return self.by_name[name].kind
        return next((kind for prefix, kind in self.prefixed.items() if name.startswith(prefix)), None)

    def faults(self, schema: pl.Schema) -> list[str]:
        """What is wrong with a table of this schema, one sentence each; empty when it may be read."""
        missing = [c for c in self.columns if not c.optional and c.name not in schema]
        found = [
            f"column `{c.name}` ({KINDS[c.kind][0]}) is missing; it has {', '.join(schema)}" for c in missing
        ]
        for group in self.one_of:
            if not any(name in schema for name in group):
                found.append(f"none of the columns {', '.join(group)} is there; it has {', '.join(schema)}")
        for name, dtype in schema.items():
            kind = self.kind_of(name)
            if kind is not None and not KINDS[kind][1](dtype):
                found.append(f"column `{name}` is {dtype}, expected {KINDS[kind][0]}")
        return found
