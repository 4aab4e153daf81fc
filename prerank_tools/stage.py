"""What a stage is: the seam between a domain (`gsu/stage.py`, ...) and the machinery in `run/`.

A domain subclasses `Stage`; `run.job` plans, maps, reduces and publishes it. Nothing here knows a
domain word, and nothing here touches a disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from prerank_tools.errors import GateError

if TYPE_CHECKING:
    import polars as pl

    from prerank_tools.tables.table import Folder, Table


SMALL_ROWS = 2_000  # of a work that --dry-run tries as a whole


@dataclass(frozen=True)
class Shard:
    """The unit of memory, commit, resume and parallelism: rows `offset .. offset + rows` of one input part.

    `extra` holds what else names the work of this shard (a bucket number, say); JSON values only.
    """

    index: int
    path: str = ""
    offset: int = 0
    rows: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """A shard that `--dry-run` tries, and how many of its like the work has (0: tried for its memory alone).

    `more_bytes` is memory that the real shard takes beyond this one, where this one is a piece of it.
    """

    shard: Shard
    times: float
    more_bytes: int = 0


@dataclass
class Part:
    """What a shard becomes: its rows of the output, the rows refused with a reason, and counts to add up.

    `frame` is None where a stage has no main table. `tables` are further named tables, published as
    `<output>/<name>/data/part-*.parquet`, each with a manifest of its own. `linked` are parts of an
    earlier output, as its manifest lists them but with absolute paths, that go into this one as they stand.
    `counts` are numbers summed over shards and written to the manifest's `counts`; `rows_in` is required
    where rows can be quarantined or dropped.
    """

    frame: pl.DataFrame | None
    quarantine: pl.DataFrame | None = None
    counts: dict[str, int | float] = field(default_factory=dict)
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    linked: Sequence[Mapping[str, Any]] = ()


def _silent(event: str, **fields: Any) -> None:
    """The default log: a module function, since a context travels to other processes."""


@dataclass
class Context:
    """What the run hands to a stage: where to work, with what, and where to say so.

    `work` becomes the output folder when the job publishes, so an artefact written to `work / "codebook"`
    is published as `<output>/codebook`. `scratch` is swept before publishing. `cache` lives as long as the
    process: a model loaded in one shard is there for the next.
    """

    work: Path
    threads: int = 2
    device: str = "cpu"
    log: Callable[..., None] = _silent
    inputs: Mapping[str, Table | Folder] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)
    gate: str = "fail"
    gates: list[dict[str, Any]] = field(default_factory=list)
    shared_scratch: Path | None = None  # where ranks of one training meet; `work / "_tmp"` otherwise

    def table(self, role: str) -> Table:
        """The table of that role; a KeyError is a bug of the stage, not of the user."""
        return cast("Table", self.inputs[role])

    def hold(self, name: str, *, passed: bool, message: str, hint: str) -> None:
        """Record a quality gate; one that does not pass stops the job unless it runs with `--gate warn`."""
        self.gates.append({"gate": name, "passed": passed, "message": message})
        if passed:
            return
        if self.gate == "fail":
            raise GateError(message, hint)
        self.log("gate", name=name, message=message, hint=hint)

    @property
    def scratch(self) -> Path:
        """Temporaries on the same filesystem as the output; swept when the job ends."""
        path = self.shared_scratch or self.work / "_tmp"
        path.mkdir(parents=True, exist_ok=True)
        return path


class Stage:
    """One command's work. Subclasses are frozen dataclasses of paths and plain values (they are pickled).

    Table stages implement `plan` and `process` (and `prepare`, `reduce` where a step is global); model and
    file stages set `kind` and implement `build`.
    """

    name: ClassVar[str]  # "gsu.topk": command group and command
    version: ClassVar[int] = 1  # raise it when the same inputs and parameters give another result
    kind: ClassVar[str] = "table"  # "table", "model" or "files"
    output: ClassVar[str] = ""  # name of the output table's contract
    sort_key: ClassVar[tuple[str, ...]] = ()  # rows are sorted by it inside each part
    compression: ClassVar[Literal["zstd", "uncompressed"]] = "zstd"  # "uncompressed" for embedding tables
    reduce_row_bytes: ClassVar[int] = 0  # memory that `reduce` holds of every row of the input, for --dry-run
    tables: ClassVar[Mapping[str, str]] = {}  # name of a side table in `Part.tables` -> its contract, or ""

    def inputs(self) -> Mapping[str, tuple[Path, str]]:
        """Role -> (path, contract name); contract "" for a model folder or any other file."""
        raise NotImplementedError

    def params(self) -> Mapping[str, Any]:
        """Every parameter that can change the result, as JSON values; engine, workers and paths are not."""
        raise NotImplementedError

    def check(self, ctx: Context) -> None:
        """Refuse what cannot work before anything is written (mismatched fingerprints, widths, times)."""

    def prepare(self, ctx: Context) -> None:
        """Fit once, before the map, what `process` needs; write it under `ctx.work`."""

    def plan(self, ctx: Context) -> Sequence[Shard]:
        """Cut the work into shards. Called before `prepare`."""
        raise NotImplementedError

    def process(self, shard: Shard, ctx: Context) -> Part:
        """Read, compute and return one shard; called in any process and any order."""
        raise NotImplementedError

    def reduce(self, parts: Sequence[Path], ctx: Context) -> Iterable[Part] | Iterator[Part] | None:
        """Turn the mapped parts into the final ones, in order; None when the map is the result."""
        return None

    def build(self, ctx: Context) -> Mapping[str, Any]:
        """Model and file stages: write everything under `ctx.work`, return the quality numbers."""
        raise NotImplementedError

    def footer(self) -> Mapping[str, Any]:
        """What else the footer of each part says (a packed format's name, say)."""
        return {}

    @property
    def folder_only(self) -> bool:
        """Whether the output holds more than one table's rows, so that it cannot be a single file."""
        return False

    def quality(self, counts: Mapping[str, float], ctx: Context) -> Mapping[str, Any]:
        """Quality numbers for the manifest, from the summed counts."""
        return {}

    def data_cutoff(self, ctx: Context) -> int | None:
        """Latest event time (epoch seconds) that shaped the output; by default the maximum over the inputs.

        A stage that reads a log strictly as of a request's own time leaves that log out.
        """
        cutoffs = [t.data_cutoff for t in ctx.inputs.values() if t.data_cutoff is not None]
        return max(cutoffs, default=None)

    def table_cutoff(self, name: str, ctx: Context, cutoff: int | None) -> int | None:
        """`data_cutoff` of a side table where it differs from the whole's (the halves of a time split)."""
        return cutoff

    def estimate(self, ctx: Context, shards: Sequence[Shard]) -> Mapping[str, Any]:
        """What `--dry-run` says beyond the number of shards: `rows_out`, `bytes_out`, `memory_bytes`.

        What is left out is found by trying shards.
        """
        return {}

    def trials(self, ctx: Context, shards: Sequence[Shard]) -> Sequence[Trial]:
        """Shards for `--dry-run` to try: all of a small work, else a middle and the largest one of a kind."""
        if sum(shard.rows for shard in shards) <= SMALL_ROWS:
            return [Trial(shard, 1) for shard in shards]
        trials: list[Trial] = []
        for kind in dict.fromkeys(map(self.kind_of, shards)):
            alike = [shard for shard in shards if self.kind_of(shard) == kind]
            by_rows = sorted(alike, key=lambda shard: (shard.rows, shard.index))
            middle, largest, rows = by_rows[len(by_rows) // 2], by_rows[-1], sum(s.rows for s in alike)
            trials.append(Trial(middle, rows / middle.rows if middle.rows else len(alike)))
            if largest.rows > 1.2 * middle.rows:
                trials.append(Trial(largest, 0))
        return trials

    def kind_of(self, shard: Shard) -> str:
        """Shards of one kind stand for each other: their rows make as many rows and bytes."""
        return ""

    def prepare_trials(self, ctx: Context, trials: Sequence[Trial]) -> None:
        """What `process` needs for the trials alone, in a scratch folder; by default all of `prepare`."""
        self.prepare(ctx)

    def lineage(self, ctx: Context) -> Mapping[str, str]:
        """Fingerprints of the spaces the output lives in: {"encoder": ..., "codebook": ...}."""
        merged: dict[str, str] = {}
        for table in ctx.inputs.values():
            merged.update(table.lineage)
        return merged
