"""Histories: which events of a log a user had at a time, and which basket came next."""

# N events, U users, I items, S samples, M meta numbers, C content dims, H heads

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Catalogue:
    """What is known of the items of a log; one row more than items, all zeros, stands for padding."""

    bucket_I: np.ndarray  # int64, hashed id from 1 up
    content_IC: np.ndarray  # float32, zeros where the item has no vector

    @property
    def without_vector(self) -> np.ndarray:
        """True where an item has no vector, (I,)."""
        return np.asarray(~self.content_IC.any(axis=1))

    @property
    def padding(self) -> int:
        """The row that stands for no item."""
        return len(self.bucket_I) - 1


@dataclass(frozen=True)
class Log:
    """Events in the order (user, time): the events of a user are neighbours."""

    user_N: np.ndarray  # int64, 0 .. U-1, ascending
    item_N: np.ndarray  # int64, row of the catalogue
    time_N: np.ndarray  # int64 epoch seconds
    known_N: np.ndarray  # int64, from when on the event is known: later than its time where it came in late
    action_N: np.ndarray  # int64, place in the vocabulary, 0 where unknown
    surface_N: np.ndarray
    meta_NM: np.ndarray  # float32

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of every user, and the number of rows at the end."""
        users = int(self.user_N[-1]) + 1 if len(self.user_N) else 0
        return np.searchsorted(self.user_N, np.arange(users + 1))

    @cached_property
    def has_late(self) -> bool:
        """Whether any event became known after it happened."""
        return bool((self.known_N > self.time_N).any())


@dataclass(frozen=True)
class Histories:
    """For every sample the rows of the log in its history, oldest first, and how many there were in all."""

    rows: list[np.ndarray]
    count_S: np.ndarray  # int64, before the cut to the newest `limit`

    def take(self, which: np.ndarray) -> Histories:
        """The histories of some samples."""
        return Histories([self.rows[i] for i in which], self.count_S[which])


def as_of(log: Log, user_S: np.ndarray, at_S: np.ndarray, *, limit: int) -> Histories:
    """Events strictly before `at_S` and known strictly before it, the newest `limit` of them."""
    rows = [_before(log, int(user), int(at)) for user, at in zip(user_S, at_S, strict=True)]
    count_S = np.array([len(r) for r in rows], dtype=np.int64)
    return Histories([r[-limit:] for r in rows], count_S)


def _before(log: Log, user: int, at: int) -> np.ndarray:
    first, end = log.starts[user], log.starts[user + 1]
    last = first + np.searchsorted(log.time_N[first:end], at, side="left")
    rows = np.arange(first, last)
    return rows[log.known_N[first:last] < at] if log.has_late else rows


@dataclass(frozen=True)
class Baskets:
    """Baskets in the order (user, start): whose, when they start, and their rows of the log."""

    user_S: np.ndarray
    start_S: np.ndarray
    rows: list[np.ndarray]

    def take(self, which: np.ndarray) -> Baskets:
        """Some of the baskets."""
        return Baskets(self.user_S[which], self.start_S[which], [self.rows[i] for i in which])


def baskets(log: Log, *, gap: int, basket_N: np.ndarray | None = None) -> Baskets:
    """Group events: by the number given, else a new basket after more than `gap` seconds of silence."""
    if not len(log.user_N):
        empty = np.zeros(0, dtype=np.int64)
        return Baskets(empty, empty, [])
    if basket_N is None:
        new = (np.diff(log.user_N) != 0) | (np.diff(log.time_N) > gap)
        basket_N = np.r_[0, np.cumsum(new)]
    order = np.argsort(basket_N, kind="stable")  # inside a basket the order of the log stays
    first = np.flatnonzero(np.r_[True, np.diff(basket_N[order]) != 0])
    rows = np.split(order, first[1:])
    user_S, start_S = log.user_N[order[first]], log.time_N[order[first]]
    by_user = np.lexsort((start_S, user_S))
    return Baskets(user_S[by_user], start_S[by_user], [rows[i] for i in by_user])


def newest_per_user(user_S: np.ndarray, *, limit: int) -> np.ndarray:
    """Places of the last `limit` samples of every user; `user_S` is ascending."""
    end_S = np.searchsorted(user_S, user_S, side="right")
    return np.flatnonzero(end_S - np.arange(len(user_S)) <= limit)


def digest(log: Log, catalogue: Catalogue, histories: Histories) -> np.ndarray:
    """64 bits (uint64) a sample that change when its history does: an event more or less, or an item edited.

    Two equal digests mean an equal embedding under one model; that is what an incremental run rests on.
    """
    columns = [
        log.time_N.view(np.uint64),
        log.action_N.view(np.uint64),
        log.surface_N.view(np.uint64),
        _row_bits(log.meta_NM),
        catalogue.bucket_I.view(np.uint64)[log.item_N],
        _row_bits(catalogue.content_IC)[log.item_N],
    ]
    event_N = _mixed(columns)
    with np.errstate(over="ignore"):
        chained = [_chain(event_N[rows]) for rows in histories.rows]
    return _mixed([np.array(chained, dtype=np.uint64), histories.count_S.view(np.uint64)])


def _mixed(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Combine uint64 columns row by row, order-dependent: the splitmix64 finaliser after each."""
    state = np.full(len(columns[0]), 0x9E3779B97F4A7C15, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in columns:
            state = (state ^ column) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return state


def _chain(event_T: np.ndarray) -> np.uint64:
    """Polynomial hash of a sequence: position matters, and so does length."""
    power_T = np.full(len(event_T), 0x9E3779B97F4A7C15, dtype=np.uint64).cumprod()
    return np.uint64((event_T * power_T[::-1]).sum(dtype=np.uint64) + np.uint64(len(event_T)))


def _row_bits(x_ND: np.ndarray) -> np.ndarray:
    """64 bits a row of floats."""
    words = np.ascontiguousarray(x_ND, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return _mixed(list(words.T)) if words.shape[1] else np.zeros(len(words), dtype=np.uint64)
