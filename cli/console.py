"""What a person or a script sees: the result on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .options import argv


def run_stage(stage: Any, common: Mapping[str, Any]) -> Any:
    """Run a stage with a command's common options and print its result."""
    from prerank_tools.run.job import RunOptions, run

    with Progress(stage.name) as progress:
        options = RunOptions(
            workers=common["workers"],
            threads=common["threads"],
            device=str(common["device"]),
            engine=str(common["engine"]),
            overwrite=common["overwrite"],
            dry_run=common["dry_run"],
            gate=str(common["gate"]),
            compare_to=common["compare_to"],
            max_bad=common["max_bad"],
            argv=argv(),
            progress=progress.shard,
            log=progress.log,
        )
        result = run(stage, common["output"], options)
    if result.status != "followed":
        print_result(result.summary(), as_json=common["json"])
    return result


def print_result(summary: Mapping[str, Any], *, as_json: bool) -> None:
    """One JSON object, or a few `key  value` lines."""
    if as_json:
        print(json.dumps(summary, ensure_ascii=False, default=str))
        return
    for key, value in flat(summary):
        print(f"{key:<28} {shown(value)}")


def print_report(report: Mapping[str, Any], common: Mapping[str, Any]) -> None:
    """Metrics on stdout, and in a file where one was named; arrays and numpy numbers become plain ones."""
    report = json.loads(json.dumps(report, default=plain))
    if common["output"]:
        from prerank_tools.run.commit import commit_json

        commit_json(Path(common["output"]), report)
    print_result(report, as_json=common["json"])


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted keys; empty ones are left out."""
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            rows.append((f"{prefix}{key}", value))
    return rows


def plain(value: Any) -> Any:
    """A numpy number or array, a tensor, or anything else as JSON can hold it."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def shown(value: Any) -> str:
    """A number with the digits that matter, anything else as it is."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return " ".join(shown(item) for item in value)
    return str(value)


def print_error(fault: Any) -> None:
    """`error:` and `hint:`, a line each, on stderr; a rank leaves them to the process that started it."""
    place = os.environ.get("PRERANK_ERROR_FILE")
    if place:
        told = {"message": fault.message, "hint": fault.hint, "exit_code": fault.exit_code}
        with suppress(FileExistsError), Path(place).open("x") as file:  # the first to fail; others follow it
            file.write(json.dumps(told))
        return
    print(f"error: {fault.message}", file=sys.stderr)
    if fault.hint:
        print(f"hint: {fault.hint}", file=sys.stderr)


class Progress:
    """A rich bar on a terminal; otherwise one `key=value` line a shard, at most one in ten seconds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Any = None
        self.task: Any = None
        self.spoke = 0.0

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def shard(self, done: int, total: int, record: Mapping[str, Any]) -> None:
        """Report that `done` of `total` shards are committed."""
        if self.bar is not None:
            if self.task is None:
                self.task = self.bar.add_task(self.name, total=total)
            self.bar.update(self.task, completed=done)
            return
        now = time.monotonic()
        if record and (done == total or now - self.spoke > 10):
            self.spoke = now
            self.log("shard", done=f"{done}/{total}", rows=record["rows"], seconds=record["seconds"])

    def log(self, event: str, *, at: datetime | None = None, **fields: Any) -> None:
        """One UTC line on stderr: time (now, or when a worker said it), stage, event, fields."""
        told = " ".join(f"{key}={quoted(value)}" for key, value in fields.items())
        line = f"{at or datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} INFO {self.name} {event} {told}".rstrip()
        if self.bar is not None:
            self.bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


def quoted(value: Any) -> str:
    """A field's value on one line, in quotes where it holds spaces."""
    text = " ".join(shown(value).splitlines())
    return f'"{text}"' if " " in text else text
