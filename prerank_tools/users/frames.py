"""Frames of the log and of item embeddings as the arrays that the user model reads."""

# N events, I items, D dims, H heads

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prerank_tools.errors import ContractError
from prerank_tools.tables.bucketing import hash_ids
from prerank_tools.tables.events import known_at
from prerank_tools.tables.table import Table
from prerank_tools.tables.vectors import vectors_to_numpy
from prerank_tools.users.artefact import UserModelSpec
from prerank_tools.users.histories import Catalogue, Log

OPTIONAL = ("action", "surface", "value", "duration")
CACHED_BYTES = 1 << 30  # a larger table of item vectors is read again for each shard, its items only


def columns_of(events: Table, *more: str) -> list[str]:
    """Columns of the log that the model can use, those that are there."""
    return [name for name in (*OPTIONAL, *more) if name in events.schema]


def log_of(
    frame: pl.DataFrame, spec: UserModelSpec, embeddings: Table, cache: dict[str, Any]
) -> tuple[Log, Catalogue, pl.Series]:
    """Events sorted by (user, time) -> log, catalogue, and the user ids in the order of their numbers.

    Items without a vector have zeros for content and are known by their hashed id alone.
    """
    items = frame["item_id"].unique().sort()
    places = pl.DataFrame({"item_id": items, "item": np.arange(len(items))})
    coded = frame.select("item_id").join(places, on="item_id", how="left", maintain_order="left")
    log = Log(
        user_N=frame["user_id"].rle_id().cast(pl.Int64).to_numpy(),
        item_N=coded["item"].to_numpy(),
        time_N=frame["timestamp"].to_numpy(),
        known_N=known_at(frame, lag=spec.lag).to_numpy(),
        action_N=_places(frame, "action", spec.actions),
        surface_N=_places(frame, "surface", spec.surfaces),
        meta_NM=np.stack([_log_size(frame, "value"), _log_size(frame, "duration")], axis=1),
    )
    bucket_I = (hash_ids(items) % np.uint64(spec.model.item_buckets)).astype(np.int64) + 1
    content_ID = item_vectors(embeddings, items, cache)
    catalogue = Catalogue(
        bucket_I=np.r_[bucket_I, 0], content_IC=np.pad(content_ID, ((0, 1), (0, 0))).astype(np.float32)
    )
    return log, catalogue, frame["user_id"].unique(maintain_order=True)


def vocabulary(frame: pl.DataFrame, column: str, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The distinct words of a column, sorted, after those known already: places never move."""
    if column not in frame.columns:
        return known
    found = frame[column].drop_nulls().unique().sort().to_list()
    return (*known, *(word for word in found if word not in known))


def item_vectors(embeddings: Table, items: pl.Series, cache: dict[str, Any]) -> np.ndarray:
    """(I, D) float32: the vector of each item, zeros where it has none that can be used."""
    found = _vectors(embeddings, items, cache)
    x_ID = np.zeros((len(items), width_of(embeddings)), dtype=np.float32)
    rows = pl.DataFrame({"item_id": items, "at": np.arange(len(items))}).join(found[0], on="item_id")
    x_ID[rows["at"].to_numpy()] = found[1][rows["row"].to_numpy()]
    x_ID[~np.isfinite(x_ID).all(axis=1)] = 0
    return x_ID


def width_of(embeddings: Table) -> int:
    """Dims of a table of vectors."""
    dtype = embeddings.scan(["embedding"]).collect_schema()["embedding"]
    assert isinstance(dtype, pl.Array)
    return dtype.size


def check_ids(events: Table, embeddings: Table) -> None:
    """Refuse a log and a table of vectors whose item ids can never meet."""
    ours, theirs = (table.scan(["item_id"]).collect_schema()["item_id"] for table in (events, embeddings))
    if ours != theirs:
        raise ContractError(
            f"{events.path}: item_id is {ours}, but {theirs} in {embeddings.path}",
            "write both with one type of id: pl.col('item_id').cast(pl.String)",
        )


def same_encoder(
    ours: Mapping[str, str], theirs: Mapping[str, str], path: Path, *, of: str = "the user model"
) -> None:
    """Refuse item embeddings of another encoder than those that were trained on, where both name one."""
    if "encoder" in ours and "encoder" in theirs and ours["encoder"] != theirs["encoder"]:
        raise ContractError(
            f"{path}: embedded by encoder {theirs['encoder'][:12]}, {of} reads {ours['encoder'][:12]}",
            "embed the items with that encoder, or train the user model again on these embeddings",
        )


def _vectors(embeddings: Table, items: pl.Series, cache: dict[str, Any]) -> tuple[pl.DataFrame, np.ndarray]:
    key = f"vectors:{embeddings.digest}"
    if key in cache:
        return cache[key]
    scale = ["scale"] if "scale" in embeddings.schema else []
    scan = embeddings.scan(["item_id", "embedding", *scale]).drop_nulls("embedding")
    small = embeddings.rows * width_of(embeddings) * 4 <= CACHED_BYTES
    frame = (scan if small else scan.filter(pl.col("item_id").is_in(items.implode()))).collect()
    x_ND = vectors_to_numpy(frame["embedding"]).astype(np.float32)
    if scale:
        x_ND = x_ND * frame["scale"].cast(pl.Float32).to_numpy()[:, None]
    found = frame.select("item_id").with_row_index("row"), x_ND
    if small:
        cache[key] = found
    return found


def _places(frame: pl.DataFrame, column: str, words: tuple[str, ...]) -> np.ndarray:
    if column not in frame.columns or not words:
        return np.zeros(len(frame), dtype=np.int64)
    places = {word: place for place, word in enumerate(words, start=1)}
    coded = frame[column].replace_strict(places, default=0, return_dtype=pl.Int64)
    return coded.fill_null(0).to_numpy()


def _log_size(frame: pl.DataFrame, column: str) -> np.ndarray:
    if column not in frame.columns:
        return np.zeros(len(frame), dtype=np.float32)
    size = frame[column].cast(pl.Float64).fill_null(0).fill_nan(0).clip(0, 1e12)
    return np.log1p(size.to_numpy()).astype(np.float32)
