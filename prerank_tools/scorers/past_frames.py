"""The moving side: what the log says of a request's user and candidates, strictly before the request."""

# R requests, n candidates, E events of one bucket of users (sorted by user, then by when they became known)
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from prerank_tools.features.crosses import CrossFeatures, PastLog
from prerank_tools.features.statistics import PastCounts, day_of, statistic_names, statistics
from prerank_tools.gsu.frames import search_of
from prerank_tools.gsu.search import Backend, topk
from prerank_tools.gsu.simtier import TIERS, simtier
from prerank_tools.scorers.item_frames import Catalogue, codes_of
from prerank_tools.scorers.request_frames import FlatRequests
from prerank_tools.tables.events import known_at
from prerank_tools.tables.vectors import faulty_vectors, vectors_to_numpy

DAY = 86_400


@dataclass(frozen=True)
class Past:
    """The log of one bucket of users in codes, ready to be asked as of any time."""

    events: pl.DataFrame
    users: pl.Series
    item_E: np.ndarray  # row of the catalogue
    start_U: np.ndarray  # events of user u are rows start_U[u] .. start_U[u + 1]
    counts: PastCounts
    crosses: CrossFeatures

    def user_codes(self, user_ids: pl.Series) -> np.ndarray:
        """Place of each user, -1 for one without any event."""
        return codes_of(user_ids, self.users)

    def visible(self, user_R: np.ndarray, as_of_R: np.ndarray) -> np.ndarray:
        """How many of the user's events are known at T; they are the first ones of their rows."""
        return self.counts.counts(user_R, as_of_R)[:, -1]


def read_past(events: pl.DataFrame, catalogue: Catalogue, *, lag: int = 0) -> Past:
    """Order one bucket's events by (user, known since, time, item) and index them."""
    events = events.with_columns(known_at(events, lag=lag).alias("known"))
    events = events.sort("user_id", "known", "timestamp", "item_id").drop("known")
    users = events["user_id"].unique(maintain_order=True)
    user_E, item_E = codes_of(events["user_id"], users), catalogue.rows(events["item_id"])
    time_E, known_E = events["timestamp"].to_numpy(), known_at(events, lag=lag).to_numpy()
    category_N = catalogue.category
    log = PastLog(
        user_E=user_E,
        item_E=np.where(item_E < len(catalogue.ids), item_E, -1),
        time_E=time_E,
        visible_at_E=known_E,
        category_E=category_N[item_E] if category_N is not None else None,
    )
    return Past(
        events=events,
        users=users,
        item_E=item_E,
        start_U=np.searchsorted(user_E, np.arange(len(users) + 1)),
        counts=PastCounts(user_E, time_E, known_E),
        crosses=CrossFeatures(log),
    )


def user_statistics(past: Past, user_R: np.ndarray, time_R: np.ndarray) -> np.ndarray:
    """Counts and recency of each request's user as of the day: int64 [R, 5]."""
    return statistics(past.counts, user_R, day_of(time_R))


def stored_statistics(
    features: pl.DataFrame, asked: pl.DataFrame, *, key: str, time: str = "timestamp"
) -> np.ndarray:
    """The same from a table of `data features`: the latest row with `as_of` <= T; none is no past."""
    names = statistic_names()
    wanted = asked.select(key, pl.col(time).alias("as_of")).with_row_index("at").sort("as_of")
    joined = wanted.join_asof(
        features.sort("as_of"), on="as_of", by=key, strategy="backward", check_sortedness=False
    ).sort("at")
    nothing = {name: -1 if name == "recency_s" else 0 for name in names}
    return np.stack([joined[n].fill_null(nothing[n]).to_numpy() for n in names], axis=1).astype(np.int64)


def cross_features(
    past: Past, catalogue: Catalogue, user_n: np.ndarray, item_n: np.ndarray, time_n: np.ndarray
) -> np.ndarray:
    """Past of (user, item) and (user, category) at the request's own time: float32 [n, X]."""
    known_n = np.where(item_n < len(catalogue.ids), item_n, -1)
    category_N = catalogue.category
    category_n = category_N[item_n] if category_N is not None else None
    return past.crosses.compute(user_n, known_n, time_n, category_n)


def mean_history(
    past: Past, catalogue: Catalogue, user_R: np.ndarray, seen_R: np.ndarray, *, newest: int
) -> np.ndarray:
    """Mean content vector of the newest known behaviours that have one: float32 [R, D], zeros for none."""
    mean_RD = np.zeros((len(user_R), catalogue.content_ND.shape[1]), dtype=np.float32)
    has_vector_N = catalogue.has_vector
    for start in range(0, len(user_R), 256):  # 256 histories of 50 x 384 floats are 20 MB
        rows_R = np.arange(start, min(start + 256, len(user_R)))
        rows_R = rows_R[seen_R[rows_R] > 0]
        if not len(rows_R):
            continue
        stop_R = past.start_U[user_R[rows_R]] + seen_R[rows_R]
        first_R = np.maximum(stop_R - newest, past.start_U[user_R[rows_R]])
        events_h, request_h = _ranges(first_R, stop_R)
        items_h = past.item_E[events_h]
        present_R = np.bincount(request_h, weights=has_vector_N[items_h], minlength=len(rows_R))
        starts = np.cumsum(stop_R - first_R) - (stop_R - first_R)
        total_RD = np.add.reduceat(catalogue.content_ND[items_h], starts, axis=0)
        mean_RD[rows_R] = total_RD / np.maximum(present_R, 1)[:, None]
    return mean_RD


def simtier_features(
    past: Past, catalogue: Catalogue, flat: FlatRequests, *, k: int, lag: int, threads: int, device: str
) -> np.ndarray:
    """log(1 + count) of both SimTier histograms and of the searchable past: float32 [n, 2 * 22 + 1].

    The search is the one of `gsu topk`.
    """
    asked = flat.candidates.select("request_id", "item_id").with_columns(
        flat.requests["user_id"].gather(flat.request_n), flat.requests["timestamp"].gather(flat.request_n)
    )
    search = search_of(asked, past.events, lag=lag)
    rows_U = catalogue.rows(search.items)
    groups = search.with_rows(np.where(catalogue.has_vector[rows_U], rows_U, -1))
    backend: Backend = "cuda" if device == "cuda" else "numba"
    found = search.in_asked_order(topk(catalogue.content_ND, groups, k=k, threads=threads, backend=backend))
    counts_nT = [simtier(found.sims_MK), simtier(found.recent_MS), found.n_valid_M[:, None]]
    return np.log1p(np.concatenate(counts_nT, axis=1).astype(np.float32))


def stored_simtier(gsu: pl.DataFrame, candidates: pl.DataFrame) -> np.ndarray:
    """The same from a table of `gsu topk`; a candidate that is not in it has an empty past."""
    joined = candidates.select("request_id", "item_id").join(
        gsu, on=["request_id", "item_id"], how="left", maintain_order="left"
    )
    blocks = []
    for name in ("simtier", "simtier_recent"):
        found = joined[name].is_not_null()
        block = np.zeros((len(joined), TIERS), dtype=np.float32)
        block[found.to_numpy()] = vectors_to_numpy(
            joined[name].filter(found).cast(pl.Array(pl.Float32, TIERS))
        )
        blocks.append(block)
    valid = joined["n_valid"].cast(pl.Float32).fill_null(0).to_numpy()[:, None]
    return np.log1p(np.concatenate([*blocks, valid], axis=1))


def context(time_R: np.ndarray, seen_R: np.ndarray) -> np.ndarray:
    """Hour and weekday of the request on a circle, and how much past there is: float32 [R, 5]."""
    hour = 2 * np.pi * (time_R % DAY) / DAY
    weekday = 2 * np.pi * (time_R // DAY % 7) / 7
    columns = [np.sin(hour), np.cos(hour), np.sin(weekday), np.cos(weekday), np.log1p(seen_R)]
    return np.stack(columns, axis=1).astype(np.float32)


CONTEXT_WIDTH = 5


def user_vectors(users: pl.DataFrame, requests: pl.DataFrame) -> np.ndarray:
    """The latest vector with `as_of` <= T and a flag, float32 [R, D + 1]; zeros for cold users."""
    usable = users.filter(faulty_vectors(users["embedding"]).is_null()).sort("as_of")
    keys = usable.select("user_id", "as_of").with_row_index("row")
    x_VD = vectors_to_numpy(usable["embedding"]).astype(np.float32)
    wanted = requests.select("user_id", pl.col("timestamp").alias("as_of")).with_row_index("at").sort("as_of")
    row_R = wanted.join_asof(
        keys, on="as_of", by="user_id", strategy="backward", check_sortedness=False
    ).sort("at")["row"]
    warm_R = row_R.is_not_null().to_numpy()
    found_RD = np.zeros((len(requests), x_VD.shape[1] + 1), dtype=np.float32)
    found_RD[warm_R, :-1] = x_VD[row_R.drop_nulls().to_numpy()]
    found_RD[warm_R, -1] = 1
    return found_RD


def _ranges(start_G: np.ndarray, stop_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenated start..stop of every group, and the group of each."""
    size_G = stop_G - start_G
    group_h = np.repeat(np.arange(len(size_G)), size_G)
    within_h = np.arange(len(group_h)) - (np.cumsum(size_G) - size_G)[group_h]
    return start_G[group_h] + within_h, group_h
