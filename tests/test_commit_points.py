"""What goes wrong at a commit point, at every one of them, the final rename included.

At each fsync, rename and swap of a run: the disk is full, the filesystem read-only, SIGTERM arrives, an input
is replaced, a second job starts on the same output. (SIGKILL: `test_faults.py`.) A reader finds nothing, last
night's output or tonight's, whole; the same line again ends in the bytes of an undisturbed run.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prerank_cli.main import Terminated
from prerank_tools.errors import PrerankError, RetryError
from prerank_tools.run import commit
from prerank_tools.run.job import RunOptions, run
from prerank_tools.run.manifest import read_manifest
from tests.toy import Number, tree, write_items

ONE = RunOptions(workers=1, overwrite=True)
REAL = {name: getattr(commit, name) for name in ("flush", "exchange")} | {
    name: getattr(os, name) for name in ("replace", "rename")
}


@contextmanager
def counting(act: Callable[[int], None]) -> Iterator[list[int]]:
    """Call `act(n)` before the n-th commit point, counted from 1."""
    calls = [0]

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            calls[0] += 1
            act(calls[0])
            return function(*arguments)

        return call

    try:
        for name in ("replace", "rename"):
            setattr(commit.os, name, counted(REAL[name]))
        for name in ("flush", "exchange"):
            setattr(commit, name, counted(REAL[name]))
        yield calls
    finally:
        for name in ("replace", "rename"):
            setattr(commit.os, name, REAL[name])
        for name in ("flush", "exchange"):
            setattr(commit, name, REAL[name])


class World:
    """Items, a first night's output where there is one, and what tonight's must become."""

    def __init__(self, folder: Path, tag: str) -> None:
        self.folder, self.tag = folder, tag
        self.items = write_items(folder / "items.parquet", 5)
        self.last = folder / "last"
        if tag:
            run(Number(self.items), self.last, ONE)
        run(Number(self.items, tag=tag), folder / "reference", ONE)
        self.expected = tree(folder / "reference", below="data")
        self.outputs = read_manifest(folder / "reference").outputs  # type: ignore[union-attr]

    def start(self, out: Path) -> Path:
        """An output as it was last night."""
        if self.tag:
            run(Number(self.items), out, ONE)
        return out

    def points(self) -> int:
        """Commit points of tonight's run."""
        out = self.start(self.folder / "counted")
        with counting(lambda n: None) as calls:
            run(Number(self.items, tag=self.tag), out, ONE)
        return calls[0]

    def whole(self, out: Path) -> bool:
        """Whether a reader finds nothing, last night's or tonight's."""
        found = tree(out, below="data") if out.exists() else {}
        return found in ({}, tree(self.last, below="data") if self.tag else {}, self.expected)

    def again(self, out: Path) -> None:
        """The same line once more: it ends as if nothing had happened."""
        assert run(Number(self.items, tag=self.tag), out, ONE).status in ("done", "up to date")
        assert tree(out, below="data") == self.expected
        assert read_manifest(out).outputs == self.outputs  # type: ignore[union-attr]
        assert not [path for path in self.folder.iterdir() if path.name.startswith(f".{out.name}")]


@pytest.fixture(params=["", "tonight"], ids=["first night", "overwriting last night's"])
def world(tmp_path: Path, request: pytest.FixtureRequest) -> World:
    return World(tmp_path, request.param)


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [(errno.ENOSPC, 75), (errno.EROFS, 1)],
    ids=["full", "read-only"],
)
def test_a_disk_that_fails_at_any_commit_point(world: World, code: int, exit_code: int) -> None:
    points = world.points()
    assert points > 20
    for stop in range(1, points + 1):
        out = world.start(world.folder / f"out{stop}")

        def fail(n: int, stop: int = stop, out: Path = out) -> None:
            if n >= stop:  # and so does everything after it
                raise OSError(code, os.strerror(code), str(out))

        with counting(fail), pytest.raises(PrerankError) as fault:
            run(Number(world.items, tag=world.tag), out, ONE)
        assert fault.value.exit_code == exit_code, stop
        assert fault.value.hint and "\n" not in fault.value.message
        assert world.whole(out), stop
        world.again(out)


def test_sigterm_at_any_commit_point(world: World) -> None:
    for stop in range(1, world.points() + 1):
        out = world.start(world.folder / f"out{stop}")

        def stopped(n: int, stop: int = stop) -> None:
            if n == stop:
                raise Terminated  # what the handler of `prerank` does with it: exit 143

        with counting(stopped), pytest.raises(Terminated):
            run(Number(world.items, tag=world.tag), out, ONE)
        assert world.whole(out), stop
        world.again(out)


def test_an_input_replaced_at_any_commit_point(world: World) -> None:
    told = 0
    for stop in range(1, world.points() + 1):
        out = world.start(world.folder / f"out{stop}")
        before = tree(out, below="data") if out.exists() else {}
        content, times = world.items.read_bytes(), world.items.stat()

        def replace(n: int, stop: int = stop) -> None:
            if n == stop:
                write_items(world.items, 7)

        with counting(replace):
            try:
                run(Number(world.items, tag=world.tag), out, ONE)
            except RetryError as fault:
                told += 1
                assert "was replaced" in fault.message
                assert (tree(out, below="data") if out.exists() else {}) == before
            else:
                # It came when every row was read and checked: the output is that of the input as it was.
                assert tree(out, below="data") == world.expected
        world.items.write_bytes(content)
        os.utime(world.items, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert told > 15


def test_a_second_job_at_any_commit_point_is_sent_away_and_touches_nothing(world: World) -> None:
    for stop in range(1, world.points() + 1):
        out = world.start(world.folder / f"out{stop}")

        def second(n: int, stop: int = stop, out: Path = out) -> None:
            if n != stop:
                return
            seen = {path: path.stat().st_mtime_ns for path in world.folder.rglob("*")}
            with pytest.raises(RetryError, match="another job is writing it") as fault:
                run(Number(world.items, tag=world.tag), out, ONE)
            assert fault.value.exit_code == 75
            assert {path: path.stat().st_mtime_ns for path in world.folder.rglob("*")} == seen

        with counting(second):
            run(Number(world.items, tag=world.tag), out, ONE)
        assert tree(out, below="data") == world.expected
