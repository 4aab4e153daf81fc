"""Random tables that break their contract, at every command: an error with a hint, or an exact quarantine.

One small world is made once. An example breaks one of a command's tables in one or two random ways and types
the command's line. Whatever happens there is no traceback and no partial output; what a run that ends with 0
set aside is what its table held of unusable rows.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prerank_cli.main import call
from prerank_schemas import CONTRACTS
from prerank_tools.tables.vectors import numpy_to_vectors

DAY = 86_400
ITEMS, USERS, WIDTH = 40, 12, 8
QUICK = """
[train.user]
max_events = 4
[train.user.model]
width = 16
[train.user.training]
epochs = 1
[train.scorer.training]
epochs = 1
[train.quantizer]
levels = 2
codes = 4
[quantize.sid]
levels = 2
codes = 4
"""
LINES = {
    "partition": "data partition {events} --buckets 3",
    "split": "data split {events} --at 432000",
    "requests": "data requests {events} --items {items}",
    "pairs": "data pairs --events {events} --items {items} --kind copurchase",
    "features": "data features --events {events} --requests {requests} --items {items}",
    "embed items": "embed items {items} --template '{{title}}' --dim 4",
    "embed users": "embed users --events {events} --embeddings {embeddings} --model {user} --as-of 864000",
    "sid": "quantize sid {embeddings} --config {quick}",
    "sid, frozen": "quantize sid {embeddings} --codebook {codebook} --config {quick}",
    "gsu": "gsu topk --requests {requests} --events {events} --embeddings {embeddings}",
    "gsu flat": "gsu topk --requests {flat} --events {events} --embeddings {embeddings}",
    "vectors": "export vectors {embeddings}",
    "users out": "export vectors {users}",
    "sid out": "export sid {sids}",
    "quantizer": "train quantizer {embeddings} --config {quick}",
    "user": "train user --events {events} --embeddings {embeddings} --config {quick}",
    "scorer": "train scorer --requests {requests} --events {events} --items {items} "
    "--embeddings {embeddings} --users {users} --config {quick}",
    "score": "score --requests {requests} --model {scorer} --items {items} --embeddings {embeddings} "
    "--users {users} --events {events}",
}
TABLES = ("items", "events", "requests", "flat", "embeddings", "users", "sids")
CONTRACT = {
    "flat": "requests",
    "embeddings": "item_embeddings",
    "users": "user_embeddings",
    "sids": "item_sids",
}
# Commands whose manifest counts every unusable row of the one table they read.
COUNTED = ("partition", "split", "requests", "embed items", "sid", "sid, frozen", "vectors", "users out")


def frames() -> dict[str, pl.DataFrame]:
    """Tables that every command accepts."""
    rng = np.random.default_rng(0)
    items = [f"i{n:02d}" for n in range(ITEMS)]
    users = [f"u{n:02d}" for n in range(USERS)]
    rows = [
        (user, items[int(rng.integers(ITEMS))], DAY * day, DAY * day + 60, "purchase", 1.5)
        for user in users
        for day in range(1, 9)
        for _ in range(2)
    ]
    events = ["user_id", "item_id", "timestamp", "ingested_at", "action", "value"]
    asked = [(f"r{n:02d}", users[n % USERS], DAY * (9 + n % 3)) for n in range(24)]
    offered = [[items[int(i)] for i in rng.permutation(ITEMS)[:5]] for _ in asked]
    requests = pl.DataFrame(asked, schema=["request_id", "user_id", "timestamp"], orient="row").with_columns(
        pl.Series("candidates", offered),
        pl.Series("label_click", [[1, 0, int(rng.integers(2)), 0, 0] for _ in asked]),
    )
    flat = requests.explode("candidates", "label_click").rename({"candidates": "item_id"})
    x_ND = rng.normal(size=(ITEMS, WIDTH)).astype(np.float32)
    y_ND = rng.normal(size=(USERS, 4)).astype(np.float32)
    codes = rng.integers(0, 4, (ITEMS, 2)).astype(np.uint16)
    return {
        "items": pl.DataFrame(
            {
                "item_id": items,
                "title": [f"thing number {n} of kind {n % 7}" for n in range(ITEMS)],
                "category": [f"kind {n % 3}" for n in range(ITEMS)],
                "price": [float(n) for n in range(ITEMS)],
            }
        ),
        "events": pl.DataFrame(rows, schema=events, orient="row"),
        "requests": requests,
        "flat": flat,
        "embeddings": pl.DataFrame({"item_id": items}).with_columns(numpy_to_vectors("embedding", x_ND)),
        "users": pl.DataFrame({"user_id": users, "as_of": [0] * USERS}).with_columns(
            numpy_to_vectors("embedding", y_ND)
        ),
        "sids": pl.DataFrame(
            {
                "item_id": items,
                "codes": pl.Series(codes, dtype=pl.Array(pl.UInt16, 2)),
                "sid": [f"<a_{a}><b_{b}>" for a, b in codes],
            }
        ),
    }


@dataclass(frozen=True)
class Fault:
    """One change of a table: what is done to which column and rows."""

    kind: str
    column: int
    seed: int

    def apply(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The changed table; a change that the column's type does not allow leaves it as it is."""
        name = frame.columns[self.column % len(frame.columns)] if frame.columns else ""
        rng = np.random.default_rng(self.seed)
        hit = pl.Series(rng.random(len(frame)) < rng.choice([0.02, 0.3, 1.0]), dtype=pl.Boolean)
        refusals = (pl.exceptions.PolarsError, pl.exceptions.PanicException, TypeError, OverflowError)
        with contextlib.suppress(*refusals):
            return FAULTS[self.kind](frame, name, hit)
        return frame


def replaced(frame: pl.DataFrame, name: str, hit: pl.Series, value: object) -> pl.DataFrame:
    """`value` in the rows that are hit, in the column's own type."""
    new = pl.Series(name, [value if h else v for h, v in zip(hit, frame[name].to_list(), strict=True)])
    return frame.with_columns(new.cast(frame.schema[name]))


def cast(dtype: pl.DataType) -> Callable[[pl.DataFrame, str, pl.Series], pl.DataFrame]:
    """The whole column in another type."""
    return lambda frame, name, hit: frame.with_columns(pl.col(name).cast(dtype))


def of_value(value: object) -> Callable[[pl.DataFrame, str, pl.Series], pl.DataFrame]:
    """One value in some rows."""
    return lambda frame, name, hit: replaced(frame, name, hit, value)


def vector(value: float) -> Callable[[pl.DataFrame, str, pl.Series], pl.DataFrame]:
    """Vectors of one value in some rows."""

    def change(frame: pl.DataFrame, name: str, hit: pl.Series) -> pl.DataFrame:
        name = "embedding" if "embedding" in frame.columns else name
        dtype = frame.schema[name]
        return replaced(frame, name, hit, [value] * dtype.size) if isinstance(dtype, pl.Array) else frame

    return change


def ragged(frame: pl.DataFrame, name: str, hit: pl.Series) -> pl.DataFrame:
    """Lists that are cut short in some rows."""
    if not isinstance(frame.schema[name], (pl.List, pl.Array)):
        return frame
    rows = [v[: len(v) // 2] if h and v else v for h, v in zip(hit, frame[name].to_list(), strict=True)]
    return frame.with_columns(pl.Series(name, rows, dtype=pl.List(frame.schema[name].inner)))  # type: ignore[union-attr]


FAULTS: dict[str, Callable[[pl.DataFrame, str, pl.Series], pl.DataFrame]] = {
    "nulls": of_value(None),
    "null": lambda frame, name, hit: replaced(frame, name, pl.Series([True, *hit[1:] & False]), None),
    "a number": of_value(7),
    "a negative number": of_value(-(2**62)),
    "the largest number": of_value(2**63 - 1),
    "a text": of_value(""),
    "a long text": of_value("长" * 70_000),
    "control characters": of_value("\x00\n\u202e{}"),
    "an empty list": of_value([]),
    "a list of null": of_value([None]),
    "a repeated list": of_value(["i00"] * 3),
    "NaN": of_value(float("nan")),
    "infinity": of_value(float("-inf")),
    "vectors of NaN": vector(float("nan")),
    "vectors of infinity": vector(float("inf")),
    "vectors of zeros": vector(0.0),
    "vectors past float16": vector(1e6),
    "vectors whose squares overflow": vector(1e30),
    "vectors whose squares vanish": vector(1e-30),
    "ragged": ragged,
    "no such column": lambda frame, name, hit: frame.drop(name),
    "another name": lambda frame, name, hit: frame.rename({name: name.upper()}),
    "no rows": lambda frame, name, hit: frame.clear(),
    "one row": lambda frame, name, hit: frame.head(1),
    "rows twice": lambda frame, name, hit: pl.concat([frame, frame.filter(hit)]),
    "upside down": lambda frame, name, hit: frame.reverse(),
    "a column more": lambda frame, name, hit: frame.with_columns(pl.lit(None).alias("bid")),
    "all null": lambda frame, name, hit: frame.with_columns(pl.lit(None).alias(name)),
    "as text": cast(pl.String()),
    "as float": cast(pl.Float64()),
    "as boolean": cast(pl.Boolean()),
    "as small integer": cast(pl.Int8()),
    "as unsigned": cast(pl.UInt64()),
    "as datetime": cast(pl.Datetime("ms")),
    "as date": cast(pl.Date()),
    "as category": cast(pl.Categorical()),
    "as bytes": cast(pl.Binary()),
    "as decimal": cast(pl.Decimal(30, 2)),
    "as a list": lambda frame, name, hit: frame.with_columns(pl.concat_list(name)),
    "as a struct": lambda frame, name, hit: frame.with_columns(pl.struct(name).alias(name)),
    "as row numbers": lambda frame, name, hit: frame.with_columns(
        pl.int_range(pl.len(), dtype=pl.Int64).alias(name)
    ),
}
faults = st.builds(Fault, st.sampled_from(sorted(FAULTS)), st.integers(0, 6), st.integers(0, 1_000_000))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths of the tables and of the models made from them."""
    folder = tmp_path_factory.mktemp("bad_input")
    paths = {name: folder / f"{name}.parquet" for name in TABLES}
    for name, frame in frames().items():
        frame.write_parquet(paths[name])
    paths["quick"] = folder / "quick.toml"
    paths["quick"].write_text(QUICK)
    paths |= {"user": folder / "user", "scorer": folder / "scorer", "codebook": folder / "codebook"}
    # The scorer learns from requests that are older than those it will score.
    earlier = folder / "earlier.parquet"
    frames()["requests"].with_columns(pl.col("timestamp") - 4 * DAY).write_parquet(earlier)
    for line, out in (("user", "user"), ("scorer", "scorer"), ("quantizer", "codebook")):
        code, told = typed(LINES[line], {**paths, "requests": earlier}, paths[out])
        assert code == 0, told
    return paths


def typed(line: str, paths: dict[str, Path], out: Path) -> tuple[int, str]:
    """Exit code and stderr of a line; an exception that leaves `call` is what these tests are after."""
    words = line.replace("'", "").format(**paths).split()
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        how = ["--workers", "1", "--threads", "1", "--max-bad", "1", "--device", "cpu"]
        code = call([*words, "-o", str(out), *how])
    return code, errors.getvalue()


def unusable(frame: pl.DataFrame, contract: str) -> int:
    """Rows that the contract's own words refuse, counted row by row in Python."""
    required = [c for c in CONTRACTS[contract].columns if not c.nullable and c.name in frame.columns]
    bad = 0
    for row in frame.iter_rows(named=True):
        values = [row[c.name] for c in required]
        vectors = [row[c.name] for c in required if c.kind == "vector" and row[c.name] is not None]
        bad += any(value is None for value in values) or any(map(is_faulty, vectors))
    return bad


def is_faulty(values: list[float | None]) -> bool:
    """A vector with a null or something not finite in it, of zeros, or whose squares leave float32."""
    if any(v is None or not math.isfinite(v) for v in values):
        return True
    return not 1e-18 <= sum(abs(v or 0.0) for v in values) <= 1e18


def hold(name: str, world: dict[str, Path], folder: Path, place: int, found: list[Fault]) -> None:
    """Break one table of a command, type its line, and hold what comes to what is owed."""
    reads = [table for table in TABLES if f"{{{table}}}" in LINES[name]]
    table = reads[place % len(reads)]
    frame = pl.read_parquet(world[table])
    for fault in found:
        frame = fault.apply(frame)
    path, out = folder / f"{table}.parquet", folder / "out"
    frame.write_parquet(path)
    code, told = typed(LINES[name], {**world, table: path}, out)
    lines = [line for line in told.splitlines() if " INFO " not in line]
    assert code in (0, 2, 3), told
    if code:
        assert [line.split(": ")[0] for line in lines] == ["error", "hint"], told
        assert not out.exists()
        return
    manifest = json.loads((out / "manifest.json").read_text())
    assert typed_verify(out) == 0
    kept = [pl.read_parquet(part, glob=False) for part in sorted(out.glob("quarantine/*.parquet"))]
    assert sum(map(len, kept)) == manifest["counts"].get("quarantined", 0)
    assert all(part["reason"].is_not_null().all() for part in kept)
    if name in COUNTED and len(reads) == 1:
        bad = unusable(frame, CONTRACT.get(table, table))
        if name == "embed items":
            # Nothing that TF-IDF could count: an item without a vector.
            text = frame["title"].cast(pl.String).str.strip_chars("\x00\n\u202e{} ").fill_null("")
            bad = int((frame["item_id"].is_null() | (text == "")).sum())
        assert manifest["counts"]["rows_in"] == len(frame)
        assert manifest["counts"]["quarantined"] == bad


def typed_verify(out: Path) -> int:
    """Whether every published file has the checksum of the manifest."""
    with contextlib.redirect_stdout(io.StringIO()):
        return call(["inspect", str(out), "--verify"])


common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def test_the_world_as_it_is_is_accepted(world: dict[str, Path], tmp_path: Path) -> None:
    for name, line in LINES.items():
        code, told = typed(line, world, tmp_path / name.replace(" ", "_"))
        assert code == 0, (name, told)


@pytest.mark.parametrize("name", LINES)
@settings(max_examples=8, derandomize=True, **common)  # type: ignore[arg-type]
@given(place=st.integers(0, 5), found=st.lists(faults, min_size=1, max_size=2))
def test_a_broken_table_is_refused_or_its_rows_are_set_aside(
    name: str,
    world: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    place: int,
    found: list[Fault],
) -> None:
    hold(name, world, tmp_path_factory.mktemp("broken"), place, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
@settings(max_examples=150, **common)  # type: ignore[arg-type]
@given(place=st.integers(0, 5), found=st.lists(faults, min_size=1, max_size=2))
def test_many_broken_tables_are_refused_or_set_aside(
    name: str,
    world: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    place: int,
    found: list[Fault],
) -> None:
    hold(name, world, tmp_path_factory.mktemp("broken"), place, found)
