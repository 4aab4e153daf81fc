"""What of an item is encoded: its text from a template over columns, its images, and a hash of both."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import polars as pl

from prerank_tools.encoders.pictures import ImageError, Source, load, read_below
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.tables.table import open_table

HASHED = 64  # items that a thread hashes at a time
FIELD = re.compile(r"\{(\w+)\}")
# `image`, `image_2`, `image_3` ...: the main picture and further ones of the same item
IMAGE_COLUMN = re.compile(r"image(_\d+)?")
PATH_COLUMN = re.compile(r"image_path(_\d+)?")


@dataclass(frozen=True)
class Content:
    """Per item: text ("" where there is none), images, the hash of both, and why an image cannot be read."""

    texts: list[str]
    images: list[list[Source]]
    hashes: list[str]
    faults: list[str | None] = field(default_factory=list)


def read_content(
    frame: pl.DataFrame, *, template: str, images: bool, root: Path, max_bytes: int, threads: int = 1
) -> Content:
    """The content of each row; `template` "" leaves text out, `images` says whether pictures are used.

    Pictures are hashed, and read where they are files, by `threads` threads.
    """
    texts = render(frame, template) if template else [""] * len(frame)
    sources: list[list[Source]] = [[] for _ in texts]
    if not images:
        return Content(texts, sources, [content_hash(text, ()) for text in texts], [None] * len(frame))
    sources = image_sources(frame, root, max_bytes=max_bytes)
    cuts = range(0, len(texts), HASHED)
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(lambda cut: _hashed(texts[cut : cut + HASHED], sources[cut : cut + HASHED]), cuts)
        found = list(chain.from_iterable(parts))
    return Content(texts, sources, [hashed for hashed, _ in found], [fault for _, fault in found])


def _hashed(texts: Sequence[str], sources: Sequence[Sequence[Source]]) -> list[tuple[str, str | None]]:
    """Per item its hash, or "" and why a picture cannot be read."""
    found: list[tuple[str, str | None]] = []
    for text, pictures in zip(texts, sources, strict=True):
        try:
            found.append((content_hash(text, pictures), None))
        except ImageError as fault:
            found.append(("", str(fault)))
    return found


def content_hash(text: str, images: Sequence[Source]) -> str:
    """128 bits over the text and the bytes of the images, in order; equal only for equal inputs."""
    total = hashlib.blake2b(hashlib.blake2b(text.encode(), digest_size=16).digest(), digest_size=16)
    for image in images:
        total.update(hashlib.blake2b(load(image), digest_size=16).digest())
    return total.hexdigest()


def default_template(schema: Mapping[str, pl.DataType]) -> str:
    """`{title}` where there is a title, else every text column in order; "" where there is none."""
    if "title" in schema:
        return "{title}"
    reserved = ("item_id", "content_hash")
    named = [
        name
        for name, dtype in schema.items()
        if isinstance(dtype, pl.String) and name not in reserved and not PATH_COLUMN.fullmatch(name)
    ]
    return ". ".join(f"{{{name}}}" for name in named)


def peek_schema(path: Path) -> Mapping[str, pl.DataType]:
    """Columns of a table from its first footer; the run opens and checks the whole of it later."""
    folder = path / "data" if (path / "data").is_dir() else path
    try:
        return pl.read_parquet_schema(path if path.is_file() else min(folder.glob("*.parquet")))
    except (ValueError, OSError, pl.exceptions.PolarsError):
        return open_table(path, "items").schema  # which says what is wrong


def columns_of(template: str, schema: Mapping[str, pl.DataType], path: Path) -> list[str]:
    """The columns a template names; each must be in the table."""
    named = list(dict.fromkeys(FIELD.findall(template)))
    if template and not named:
        raise UsageError(f"--template {template!r} names no column", "write one like '{title}. {brand}'")
    for name in named:
        if name not in schema:
            raise ContractError(
                f"{path}: the template's column `{name}` is missing; it has {', '.join(schema)}",
                "change --template",
            )
    return named


def image_columns(schema: Mapping[str, pl.DataType]) -> list[str]:
    """Columns of image bytes and of image paths, the main picture first."""
    found = [name for name in schema if IMAGE_COLUMN.fullmatch(name) or PATH_COLUMN.fullmatch(name)]
    return sorted(found, key=lambda name: (int(re.sub(r"\D", "", name) or 1), name))


def render(frame: pl.DataFrame, template: str) -> list[str]:
    """The template filled in for each row.

    A field that is null or blank goes with the literal before it (`{title}. {brand}` without a brand is the
    title alone), and a literal between two fields needs something before it; what stands before the first
    and after the last field (a model's prompt) always stays, unless all fields are empty: then "" .
    """
    pieces = FIELD.split(template)
    literals, fields = pieces[0::2], pieces[1::2]
    columns = [text_values(frame[name]) for name in fields]
    texts = []
    for values in zip(*columns, strict=True):
        text = ""
        for literal, value in zip(["", *literals[1:-1]], values, strict=True):
            if value:
                text += (literal if text else "") + value
        texts.append(literals[0] + text + literals[-1] if text else "")
    return texts


def text_values(series: pl.Series) -> list[str]:
    """A column as stripped texts, "" for null; lists are joined by blanks."""
    if isinstance(series.dtype, (pl.List, pl.Array)):
        series = series.cast(pl.List(pl.String)).list.drop_nulls().list.join(" ")
    return series.cast(pl.String).fill_null("").str.strip_chars().to_list()


def image_sources(frame: pl.DataFrame, root: Path, *, max_bytes: int) -> list[list[Source]]:
    """The images of each row, as bytes or as a function that reads the file below `root`."""
    sources: list[list[Source]] = [[] for _ in range(len(frame))]
    inside = root.resolve()
    for name in image_columns(frame.schema):
        for row, value in enumerate(frame[name].to_list()):
            if value and isinstance(value, bytes):
                sources[row].append(value)
            elif value:
                sources[row].append(reader(inside, value, max_bytes))
    return sources


def reader(root: Path, name: str, max_bytes: int) -> Callable[[], bytes]:
    """A function that reads one image file when it is wanted."""
    return partial(read_below, root, name, max_bytes)
