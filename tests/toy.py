"""A stage small enough to reason about: it copies items, counts rows, and can sum a column in a reduce."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from prerank_tools.errors import ContractError
from prerank_tools.run.commit import commit_json
from prerank_tools.stage import Context, Part, Shard, Stage
from prerank_tools.tables.contracts import split_rows
from prerank_tools.tables.table import read_shard, shards_of


@dataclass(frozen=True)
class Copy(Stage):
    """Copy items shard by shard; a null id is a row fault."""

    items: Path
    rows: int = 3
    tag: str = ""
    name = "toy.copy"
    output = "items"

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        return {"items": (self.items, "items")}

    def params(self) -> Mapping[str, Any]:
        return {"tag": self.tag}

    def plan(self, ctx: Context) -> Sequence[Shard]:
        return shards_of(ctx.table("items"), self.rows)

    def process(self, shard: Shard, ctx: Context) -> Part:
        frame = read_shard(shard)
        good, bad = split_rows(frame, "items")
        tagged = good.with_columns(pl.lit(self.tag).alias("tag"))
        return Part(tagged, bad, {"rows_in": len(frame)})

    def quality(self, counts: Mapping[str, float], ctx: Context) -> Mapping[str, Any]:
        return {"rows_in": counts["rows_in"]}


@dataclass(frozen=True)
class Number(Copy):
    """Copy, then number all rows over all shards: a reduce; the total is an artefact fitted first."""

    name = "toy.number"

    def prepare(self, ctx: Context) -> None:
        commit_json(ctx.work / "total" / "total.json", {"rows": ctx.table("items").rows})

    @property
    def folder_only(self) -> bool:
        return True

    def reduce(self, parts: Sequence[Path], ctx: Context) -> Iterator[Part]:
        start = 0
        for path in parts:
            frame = pl.read_parquet(path, glob=False)
            numbers = pl.Series("number", range(start, start + len(frame)), dtype=pl.Int64)
            start += len(frame)
            yield Part(frame.with_columns(numbers))


def write_items(path: Path, count: int = 10, first: int = 0, **columns: Any) -> Path:
    """`count` items `i0`, `i1`, ... with titles, and whatever columns a test adds."""
    frame = pl.DataFrame(
        {
            "item_id": [f"i{n:03d}" for n in range(first, first + count)],
            "title": [f"title {n}" for n in range(first, first + count)],
            **columns,
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path)
    return path


def tree(folder: Path, *, below: str = "") -> dict[str, bytes]:
    """Every file of a folder by its name; with `below`, those under that subfolder only."""
    root = folder / below if below else folder
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


@dataclass(frozen=True)
class Dying(Copy):
    """Copy, but the first process that meets shard `at` is killed on the spot."""

    at: int = 2
    marker: Path = Path("marker")

    def process(self, shard: Shard, ctx: Context) -> Part:
        if shard.index == self.at and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().process(shard, ctx)


@dataclass(frozen=True)
class Waiting(Copy):
    """Copy, but from shard `at` on every process says so in `folder` and sleeps."""

    at: int = 1
    folder: Path = Path()

    def process(self, shard: Shard, ctx: Context) -> Part:
        if shard.index >= self.at:
            (self.folder / f"waiting{os.getpid()}").touch()
            time.sleep(300)
        return super().process(shard, ctx)


@dataclass(frozen=True)
class Talking(Copy):
    """Copy, but every shard has something to say, and shard `fails` fails after it."""

    fails: int = -1

    def process(self, shard: Shard, ctx: Context) -> Part:
        ctx.log("out_of_memory", rows=shard.rows, next=-(-shard.rows // 2))
        if shard.index == self.fails:
            raise ContractError("shard failed", "mend it")
        return super().process(shard, ctx)
