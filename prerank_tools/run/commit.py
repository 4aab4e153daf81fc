"""Make files and folders appear whole: temporary, fsync, rename; a folder is swapped in one step."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RENAME_EXCHANGE = 2
AT_FDCWD = -100


def commit_file(path: Path, write: Callable[[Path], object]) -> dict[str, Any]:
    """Write `path` through a temporary beside it; returns bytes and sha256. A kill leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def link_file(path: Path, source: Path) -> None:
    """Let `path` be another name of a published file; a copy where the filesystem cannot link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)  # not flushed: publishing flushes every folder
    except OSError as fault:
        if fault.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        commit_file(path, lambda temporary: shutil.copyfile(source, temporary) and None)


def commit_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file whole."""
    text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False, default=str) + "\n"
    commit_file(path, lambda temporary: temporary.write_text(text))


def publish(partial: Path, out: Path) -> None:
    """Let the finished folder or file appear as `out`; what is there already is swapped out and removed."""
    if partial.is_file():
        flush(partial)
        os.replace(partial, out)
        flush(out.parent)
        return
    flush_tree(partial)
    if not out.exists():
        os.rename(partial, out)
    else:
        exchange(partial, out)
        shutil.rmtree(partial, ignore_errors=True)
    flush(out.parent)


def exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step, so that a reader of either name always meets a whole folder."""
    libc = ctypes.CDLL(None, use_errno=True)
    swapped = getattr(libc, "renameat2", None)
    if swapped is not None:
        arguments = (AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
        if swapped(*arguments) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(other))
    # A filesystem without the exchange (NFS): two renames, a gap of microseconds between them.
    aside = one.with_name(one.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


def flush(path: Path) -> None:
    """fsync a file or a folder; folders best effort, since not every filesystem can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as fault:
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """fsync every folder of a tree; its files were flushed when they were written."""
    for place, _, _ in os.walk(folder):
        flush(Path(place))


def flush_files(folder: Path) -> None:
    """fsync every file of a tree, written by whoever did not."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            flush(path)


def sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
