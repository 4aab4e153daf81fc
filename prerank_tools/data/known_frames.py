"""What was known when: item ids in order, the pools negatives are drawn from, and popularity over time."""
# n events, I items

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from prerank_tools.data.negatives import Pool, Popularity, catalogue_pool
from prerank_tools.tables.events import known_at

RUN_ROWS = 1 << 20  # events sorted at a time
SAMPLED = 64  # one time in so many says where the log is cut into runs

Blocks = Callable[[], Iterator[pl.DataFrame]]


@dataclass(frozen=True)
class Known:
    """Items as codes 0 .. I-1 in the order of their ids, and from when each of them is a candidate."""

    ids: pl.Series
    pools: Mapping[str, Pool]  # "popularity" and "uniform"
    popularity: Popularity
    candidate_from: np.ndarray  # int64 (I + 1,): the last place stands for an item that is not there


def write_known(folder: Path, bought: Blocks, *, catalogue: pl.Series | None, lag: int) -> None:
    """Lay down the pools of a log: over the catalogue's items, or over those that were bought.

    `bought()` gives the events in blocks, here twice: once for the ids and times that there are, once to
    sort them. Memory is that of the items, of a block and of `RUN_ROWS` events.
    """
    folder.mkdir(exist_ok=True)
    ids, cuts = _survey(bought, lag)
    ids = ids if catalogue is None else catalogue.drop_nulls().unique().sort()
    ids.to_frame("item_id").write_ipc(folder / "items.arrow")
    rows = _scatter(folder, bought, ids, cuts, lag)
    pool = _sort_runs(folder, len(cuts) + 1, rows)
    _save(folder, "uniform", _first_seen(pool, len(ids)) if catalogue is None else catalogue_pool(len(ids)))
    _write_popularity(folder, pool, len(ids))


def read_known(folder: Path) -> Known:
    """What `write_known` laid down; the pools stay on disk and are mapped."""
    ids = pl.read_ipc(folder / "items.arrow")["item_id"]
    pools = {kind: _load(folder, kind) for kind in ("popularity", "uniform")}
    candidate_from = np.full(len(ids) + 1, np.iinfo(np.int64).max)
    candidate_from[pools["uniform"].item_n] = pools["uniform"].known_n
    keys = np.load(folder / "popularity-keys.npy", mmap_mode="r")
    return Known(ids, pools, Popularity(keys, *_span(pools["popularity"])), candidate_from)


def encode(ids: pl.Series, known: pl.Series) -> np.ndarray:
    """Place of every id in the sorted, distinct ids `known`, -1 where it is not there; `int64 (n,)`."""
    table = pl.DataFrame({"id": known}).with_row_index("code")
    joined = ids.to_frame("id").join(table, on="id", how="left", maintain_order="left")
    return joined["code"].cast(pl.Int64).fill_null(-1).to_numpy()


def _survey(bought: Blocks, lag: int) -> tuple[pl.Series, np.ndarray]:
    """(the ids that were bought, times that cut the log into runs of some `RUN_ROWS` events)."""
    ids: pl.Series | None = None
    sample: list[np.ndarray] = []
    for block in bought():
        found = block["item_id"].unique()
        ids = found if ids is None else pl.concat([ids, found]).unique()
        sample.append(known_at(block, lag=lag).to_numpy()[::SAMPLED])
    assert ids is not None, "a log has at least one block"
    times = np.sort(np.concatenate(sample))
    return ids.sort(), np.unique(times[RUN_ROWS // SAMPLED :: RUN_ROWS // SAMPLED])


def _scatter(folder: Path, bought: Blocks, ids: pl.Series, cuts: np.ndarray, lag: int) -> int:
    """Append (time, item) pairs to the file of their run; returns how many there are."""
    paths = [_run(folder, run) for run in range(len(cuts) + 1)]
    for path in paths:
        path.write_bytes(b"")
    rows = 0
    for block in bought():
        code_n, known_n = encode(block["item_id"], ids), known_at(block, lag=lag).to_numpy()
        pairs = np.stack([known_n, code_n], axis=1)[code_n >= 0]
        run_n = np.searchsorted(cuts, pairs[:, 0], side="right")
        pairs = pairs[np.argsort(run_n, kind="stable")]
        ends = np.cumsum(np.bincount(run_n, minlength=len(paths)))
        for path, start, end in zip(paths, [0, *ends], ends, strict=False):
            if end > start:
                with path.open("ab") as stream:
                    stream.write(pairs[start:end].tobytes())
        rows += len(pairs)
    return rows


def _sort_runs(folder: Path, runs: int, rows: int) -> Pool:
    """One entry an event, by time and item: drawing from it follows the popularity of the log."""
    items = np.lib.format.open_memmap(folder / "popularity-items.npy", "w+", np.int64, (rows,))
    known = np.lib.format.open_memmap(folder / "popularity-known.npy", "w+", np.int64, (rows,))
    done = 0
    for path in (_run(folder, run) for run in range(runs)):
        known_n, item_n = np.fromfile(path, np.int64).reshape(-1, 2).T
        order = np.lexsort((item_n, known_n))
        known[done : done + len(order)], items[done : done + len(order)] = known_n[order], item_n[order]
        done += len(order)
        path.unlink()
    return Pool(items, known)


def _first_seen(pool: Pool, items: int) -> Pool:
    """One entry an item, at the time it was first seen, in that order."""
    seen_I = np.zeros(items, dtype=bool)
    places: list[np.ndarray] = []
    for start in range(0, len(pool.item_n), RUN_ROWS):
        item_n, first_n = np.unique(pool.item_n[start : start + RUN_ROWS], return_index=True)
        places.append(start + np.sort(first_n[~seen_I[item_n]]))
        seen_I[item_n] = True
    at = np.concatenate([np.zeros(0, np.int64), *places])
    return Pool(np.asarray(pool.item_n[at]), np.asarray(pool.known_n[at]))


def _write_popularity(folder: Path, pool: Pool, items: int) -> None:
    """The keys (item, time) of `Popularity`, put in place item by item: the pool is in time order already."""
    start, span = _span(pool)
    count_I = np.zeros(items, dtype=np.int64)
    for item_n in _pieces(pool.item_n):
        count_I += np.bincount(item_n, minlength=items)
    next_I = np.cumsum(count_I) - count_I
    keys = np.lib.format.open_memmap(folder / "popularity-keys.npy", "w+", np.int64, (len(pool.item_n),))
    for item_n, known_n in zip(_pieces(pool.item_n), _pieces(pool.known_n), strict=True):
        order = np.argsort(item_n, kind="stable")
        item_n, known_n = item_n[order], known_n[order]
        count_n = np.bincount(item_n, minlength=items)
        first_I = np.cumsum(count_n) - count_n
        keys[next_I[item_n] + np.arange(len(item_n)) - first_I[item_n]] = item_n * span + (known_n - start)
        next_I += count_n


def _span(pool: Pool) -> tuple[int, int]:
    """`Popularity`'s first time, and the length of its times."""
    if not len(pool.known_n):
        return 0, 1
    start = int(pool.known_n[0])
    return start, int(pool.known_n[-1]) - start + 2


def _pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    return (np.asarray(values[start : start + RUN_ROWS]) for start in range(0, len(values), RUN_ROWS))


def _run(folder: Path, run: int) -> Path:
    return folder / f"run-{run:05d}.bin"


def _save(folder: Path, kind: str, pool: Pool) -> None:
    np.save(folder / f"{kind}-items.npy", pool.item_n)
    np.save(folder / f"{kind}-known.npy", pool.known_n)


def _load(folder: Path, kind: str) -> Pool:
    return Pool(*(np.load(folder / f"{kind}-{name}.npy", mmap_mode="r") for name in ("items", "known")))
