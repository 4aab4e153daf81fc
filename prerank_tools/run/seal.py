"""The checksum of a single-file output, inside of it: sha256 of the file while its place held zeros."""

from __future__ import annotations

import hashlib
from pathlib import Path

BLANK = "0" * 64
KEY = "file_sha256"
MARK = f'"{KEY}": "'.encode()
BLOCK = 1 << 20


def seal(path: Path) -> None:
    """Fill in the checksum of a file whose Parquet footer says `KEY: BLANK`; not flushed."""
    place = _place(path)
    assert place is not None, f"{path}: no place for its checksum"
    digest = _digest(path, place)
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write(digest.encode())


def is_whole(path: Path) -> bool:
    """Whether a sealed file has the bytes it was sealed with; False where it holds no seal."""
    place = _place(path)
    if place is None:
        return False
    with path.open("rb") as stream:
        stream.seek(place)
        said = stream.read(len(BLANK))
    return said == _digest(path, place).encode()


def _place(path: Path) -> int | None:
    """Where the checksum stands: in the footer, the last thing in a Parquet file."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(max(0, size - 8))
        footer = min(size, int.from_bytes(stream.read(4), "little") + 8)
        stream.seek(size - footer)
        at = stream.read().rfind(MARK)
    return None if at < 0 else size - footer + at + len(MARK)


def _digest(path: Path, place: int) -> str:
    total, left = hashlib.sha256(), place
    with path.open("rb") as stream:
        while left:
            block = stream.read(min(BLOCK, left))
            total.update(block)
            left -= len(block)
        stream.seek(len(BLANK), 1)
        total.update(BLANK.encode())
        while block := stream.read(BLOCK):
            total.update(block)
    return total.hexdigest()
