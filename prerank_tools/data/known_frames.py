"""What was known when: item ids in order, the pools negatives are drawn from, and popularity over time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from prerank_tools.data.negatives import Pool, Popularity, catalogue_pool, popularity_pool, uniform_pool
from prerank_tools.tables.events import known_at


@dataclass(frozen=True)
class Known:
    """Items as codes 0 .. I-1 in the order of their ids, and from when each of them is a candidate."""

    ids: pl.Series
    pools: Mapping[str, Pool]  # "popularity" and "uniform"
    popularity: Popularity
    candidate_from: np.ndarray  # int64 (I + 1,): the last place stands for an item that is not there


def write_known(folder: Path, bought: pl.DataFrame, *, catalogue: pl.Series | None, lag: int) -> None:
    """Lay down the pools of a log: over the catalogue's items, or over those that were bought."""
    ids = (bought["item_id"] if catalogue is None else catalogue).drop_nulls().unique().sort()
    code_n = encode(bought["item_id"], ids)
    known_n = known_at(bought, lag=lag).to_numpy()
    popularity = popularity_pool(code_n[code_n >= 0], known_n[code_n >= 0])
    uniform = uniform_pool(popularity) if catalogue is None else catalogue_pool(len(ids))
    folder.mkdir(exist_ok=True)
    ids.to_frame("item_id").write_ipc(folder / "items.arrow")
    for kind, pool in {"popularity": popularity, "uniform": uniform}.items():
        np.save(folder / f"{kind}-items.npy", pool.item_n)
        np.save(folder / f"{kind}-known.npy", pool.known_n)


def read_known(folder: Path) -> Known:
    """What `write_known` laid down; the pools stay on disk and are mapped."""
    ids = pl.read_ipc(folder / "items.arrow")["item_id"]
    pools = {
        kind: Pool(*(np.load(folder / f"{kind}-{name}.npy", mmap_mode="r") for name in ("items", "known")))
        for kind in ("popularity", "uniform")
    }
    candidate_from = np.full(len(ids) + 1, np.iinfo(np.int64).max)
    candidate_from[pools["uniform"].item_n] = pools["uniform"].known_n
    return Known(ids, pools, Popularity.of(pools["popularity"]), candidate_from)


def encode(ids: pl.Series, known: pl.Series) -> np.ndarray:
    """Place of every id in the sorted, distinct ids `known`, -1 where it is not there; `int64 (n,)`."""
    table = pl.DataFrame({"id": known}).with_row_index("code")
    joined = ids.to_frame("id").join(table, on="id", how="left", maintain_order="left")
    return joined["code"].cast(pl.Int64).fill_null(-1).to_numpy()
