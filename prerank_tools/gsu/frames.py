"""Frames as the arrays of a search: who asks when about what, and which behaviours each request may see."""
# R rows asked (request, candidate), N behaviours, G groups, M candidates in search order, U distinct items

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from prerank_tools.gsu.search import Groups, TopK
from prerank_tools.tables.events import known_at


@dataclass(frozen=True)
class Search:
    """A search in terms of distinct items: rows of `groups` are places in `items`.

    `asked` is the flat table (request_id, user_id, timestamp, item_id); `order_M` says which of its rows is
    the m-th candidate of the search.
    """

    asked: pl.DataFrame
    items: pl.Series
    groups: Groups
    order_M: np.ndarray

    def with_rows(self, row_of_U: np.ndarray) -> Groups:
        """The groups over the rows of a table of vectors; -1 for an item that is not in it."""
        history_rows_N = row_of_U[self.groups.history_rows_N]
        return self.groups._replace(
            history_rows_N=history_rows_N, candidate_rows_M=row_of_U[self.groups.candidate_rows_M]
        )

    def in_asked_order(self, found: TopK) -> TopK:
        """Results in the order of `asked`."""
        back_R = np.empty_like(self.order_M)
        back_R[self.order_M] = np.arange(len(back_R))
        return TopK(*(part[back_R] for part in found))


def flat_requests(requests: pl.DataFrame) -> pl.DataFrame:
    """(request_id, user_id, timestamp, item_id): a row a candidate, by request and item, each once."""
    if "candidates" in requests.columns:
        # Without the list itself, which would be repeated on each of its rows.
        listed = requests.select("request_id", "user_id", "timestamp", pl.col("candidates").alias("item_id"))
        requests = listed.explode("item_id")
    asked = requests.select("request_id", "user_id", "timestamp", "item_id").drop_nulls()
    asked = asked.sort("request_id", "item_id", maintain_order=True)
    # In order, the same pair again follows itself: no table of all pairs is needed.
    again = pl.all_horizontal(pl.col(name) == pl.col(name).shift() for name in ("request_id", "item_id"))
    return asked.filter(~again.fill_null(False))


def search_of(asked: pl.DataFrame, events: pl.DataFrame, *, lag: int = 0) -> Search:
    """Join flat requests with the log of their users, strictly as of each request's own time.

    A behaviour counts where its timestamp and, in a log that has it, `ingested_at + lag` are before the
    request. Requests of a user share one history, of which each sees a prefix; a request that must not see
    some late row within its prefix gets a history of its own.
    """
    users = asked["user_id"].unique().sort()
    events = events.filter(pl.col("user_id").is_in(users.implode()))
    items = pl.concat([asked["item_id"], events["item_id"]]).unique().sort()
    item_R, user_R = _codes(asked["item_id"], items), _codes(asked["user_id"], users)
    log = pl.DataFrame(
        {
            "user": _codes(events["user_id"], users),
            "time": events["timestamp"],
            "item": _codes(events["item_id"], items),
            "known": known_at(events, lag=lag),
        }
    )
    # Oldest first; of two at one time the smaller id is last: "later in the history" settles every tie.
    log = log.sort(["user", "time", "item", "known"], descending=[False, False, True, False])
    user_N, time_N, item_N, known_N = (column.to_numpy() for column in log)
    time_R = asked["timestamp"].to_numpy()
    first_R = np.searchsorted(user_N, user_R)
    visible_R = _before(user_N, time_N, user_R, time_R) - first_R
    late_R = _latest_known(user_N, known_N, first_R, visible_R) >= time_R
    groups, order_M = _grouped(item_N, known_N, item_R, user_R, time_R, first_R, visible_R, late_R)
    return Search(asked, items, groups, order_M)


def _grouped(
    item_N: np.ndarray,
    known_N: np.ndarray,
    item_R: np.ndarray,
    user_R: np.ndarray,
    time_R: np.ndarray,
    first_R: np.ndarray,
    visible_R: np.ndarray,
    late_R: np.ndarray,
) -> tuple[Groups, np.ndarray]:
    """One group a user for the requests that see a plain prefix, one a (user, time) for those that do not."""
    at_R = np.where(late_R, time_R, np.iinfo(np.int64).min)
    order_M = np.lexsort((np.arange(len(user_R)), at_R, user_R))
    user_M, at_M = user_R[order_M], at_R[order_M]
    changes = (user_M[1:] != user_M[:-1]) | (at_M[1:] != at_M[:-1])
    starts = np.flatnonzero(np.r_[len(user_M) > 0, changes])
    candidate_offsets = np.r_[starts, len(user_M)].astype(np.int64)
    visible_M = visible_R[order_M].copy()
    histories = []
    for group, row in enumerate(order_M[candidate_offsets[:-1]]):
        members = slice(candidate_offsets[group], candidate_offsets[group + 1])
        seen = slice(first_R[row], first_R[row] + visible_M[members].max())
        rows = item_N[seen]
        if late_R[row]:
            rows = rows[known_N[seen] < time_R[row]]
            visible_M[members] = len(rows)
        histories.append(rows)
    groups = Groups(
        history_rows_N=np.concatenate(histories) if histories else np.empty(0, dtype=np.int64),
        history_offsets=np.cumsum([0, *map(len, histories)]),
        candidate_rows_M=item_R[order_M],
        candidate_offsets=candidate_offsets,
        visible_M=visible_M,
    )
    return groups, order_M


def _codes(values: pl.Series, known: pl.Series) -> np.ndarray:
    """Place of each value in a sorted series of distinct ones."""
    places = pl.DataFrame({"value": known, "place": np.arange(len(known), dtype=np.int64)})
    joined = values.alias("value").to_frame().join(places, on="value", how="left", maintain_order="left")
    return joined["place"].to_numpy()


def _before(user_N: np.ndarray, time_N: np.ndarray, user_R: np.ndarray, time_R: np.ndarray) -> np.ndarray:
    """Number of rows of a (user, time)-sorted log that come before (user, time)."""
    times = np.unique(time_N)
    stride = np.int64(len(times) + 1)
    place_N = user_N * stride + np.searchsorted(times, time_N)
    return np.searchsorted(place_N, user_R * stride + np.searchsorted(times, time_R))


def _latest_known(
    user_N: np.ndarray, known_N: np.ndarray, first_R: np.ndarray, visible_R: np.ndarray
) -> np.ndarray:
    """When the last of the first `visible_R` rows of a user became known; the beginning of time for none."""
    none = np.iinfo(np.int64).min
    if not len(known_N):
        return np.full(len(first_R), none)
    latest_N = (
        pl.DataFrame({"user": user_N, "known": known_N})
        .select(pl.col("known").cum_max().over("user"))["known"]
        .to_numpy()
    )
    last_R = np.clip(first_R + visible_R - 1, 0, len(known_N) - 1)
    return np.where(visible_R > 0, latest_N[last_R], none)
