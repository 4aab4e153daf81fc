"""Point-in-time counts and recency: what was known about a user, an item or a pair strictly before T."""

# E events, Q queries, W windows
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DAY = 86_400
ALL_TIME = 0  # a window of 0 seconds means everything that was visible before T
WINDOWS = (1 * DAY, 7 * DAY, 30 * DAY, ALL_TIME)


class PastCounts:
    """Events of every key (a user, an item, a pair), sorted so that (key, T) is answered by binary search.

    An event is visible at T when `timestamp < T` and `visible_at < T` (the moment it was ingested plus the
    lag), and it lies in a window of w seconds when `timestamp >= T - w`. It therefore enters every window at
    max(timestamp, visible_at) and leaves a window at max(timestamp + w, visible_at), so a count is the
    difference of two ranks, exact also for late rows.
    """

    def __init__(
        self,
        keys_E: np.ndarray,
        times_E: np.ndarray,
        visible_at_E: np.ndarray | None = None,
        *,
        windows: Sequence[int] = WINDOWS,
    ) -> None:
        self.windows = tuple(windows)
        self.keys, code_E = np.unique(np.asarray(keys_E, dtype=np.int64), return_inverse=True)
        times_E = np.asarray(times_E, dtype=np.int64)
        visible_E = (
            times_E if visible_at_E is None else np.maximum(times_E, np.asarray(visible_at_E, np.int64))
        )
        order_E = np.lexsort((visible_E, code_E.reshape(-1)))
        self._index(code_E.reshape(-1)[order_E], times_E[order_E], visible_E[order_E])

    def _index(self, code_E: np.ndarray, time_E: np.ndarray, visible_E: np.ndarray) -> None:
        """One sorted array of (key, moment) for entering and one a window for leaving."""
        last = int(visible_E.max(initial=0)) + max(self.windows, default=0)
        self.origin = int(time_E.min(initial=last))
        self.span = last - self.origin + 2  # a T after every moment shares the last place
        if self.span * (len(self.keys) + 1) >= 2**63:
            raise ValueError(f"{len(self.keys)} keys over {self.span} seconds do not fit one integer")
        self.first_K = np.searchsorted(code_E, np.arange(len(self.keys)))
        self.entered_E = code_E * self.span + (visible_E - self.origin)
        self.left_E = {
            w: np.sort(code_E * self.span + np.maximum(visible_E, time_E + w) - self.origin)
            for w in self.windows
            if w != ALL_TIME
        }
        # a running maximum of (key, time) never mixes keys: the key is the more significant part
        latest_E = np.maximum.accumulate(code_E * self.span + (time_E - self.origin))
        self.latest_E = latest_E - code_E * self.span + self.origin

    def counts(self, keys_Q: np.ndarray, as_of_Q: np.ndarray) -> np.ndarray:
        """Events of each key visible at its T, one column a window: int64 [Q, W]."""
        entered_Q = self._rank(self.entered_E, keys_Q, as_of_Q)
        counts_QW = np.repeat(entered_Q[:, None], len(self.windows), axis=1)
        for column, window in enumerate(self.windows):
            if window != ALL_TIME:
                counts_QW[:, column] -= self._rank(self.left_E[window], keys_Q, as_of_Q)
        return counts_QW

    def recency(self, keys_Q: np.ndarray, as_of_Q: np.ndarray) -> np.ndarray:
        """Seconds since the key's latest visible event at T; -1 where there is none: int64 [Q]."""
        seen_Q = self._rank(self.entered_E, keys_Q, as_of_Q)
        has_Q = seen_Q > 0
        code_Q = self._codes(keys_Q)[0][has_Q]
        recency_Q = np.full(len(seen_Q), -1, dtype=np.int64)
        recency_Q[has_Q] = (
            np.asarray(as_of_Q)[has_Q] - self.latest_E[self.first_K[code_Q] + seen_Q[has_Q] - 1]
        )
        return recency_Q

    def _rank(self, sorted_E: np.ndarray, keys_Q: np.ndarray, as_of_Q: np.ndarray) -> np.ndarray:
        """How many events of each key have their moment before T."""
        code_Q, known_Q = self._codes(keys_Q)
        if not known_Q.any():
            return np.zeros(len(code_Q), dtype=np.int64)
        moment_Q = np.clip(np.asarray(as_of_Q, np.int64) - self.origin, 0, self.span - 1)
        rank_Q = np.searchsorted(sorted_E, code_Q * self.span + moment_Q, side="left")
        return np.where(known_Q, rank_Q - self.first_K[code_Q], 0)

    def _codes(self, keys_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position of each key and whether it has any event."""
        keys_Q = np.asarray(keys_Q, dtype=np.int64)
        if not len(self.keys):
            return np.zeros(len(keys_Q), np.int64), np.zeros(len(keys_Q), bool)
        code_Q = np.minimum(np.searchsorted(self.keys, keys_Q), len(self.keys) - 1)
        return code_Q, self.keys[code_Q] == keys_Q


def day_of(times_Q: np.ndarray, *, granularity: int = DAY) -> np.ndarray:
    """The as-of time of a stored statistic: T rounded down to a whole UTC day, never later than T."""
    times_Q = np.asarray(times_Q, dtype=np.int64)
    return times_Q - times_Q % granularity


def statistic_names(windows: Sequence[int] = WINDOWS) -> tuple[str, ...]:
    """Column names of `statistics`: `count_1d`, `count_7d`, `count_30d`, `count_all`, `recency_s`."""
    return (*(f"count_{_window_name(w)}" for w in windows), "recency_s")


def statistics(past: PastCounts, keys_Q: np.ndarray, as_of_Q: np.ndarray) -> np.ndarray:
    """Counts in every window and recency, int64 [Q, W + 1], in the order of `statistic_names`."""
    counts_QW = past.counts(keys_Q, as_of_Q)
    return np.concatenate([counts_QW, past.recency(keys_Q, as_of_Q)[:, None]], axis=1)


def compress(statistics_QW: np.ndarray) -> np.ndarray:
    """log(1 + x) of counts and seconds; "never" (-1) becomes a recency of ten years."""
    values = np.asarray(statistics_QW, dtype=np.float64)
    return np.log1p(np.where(values < 0, 10 * 365 * DAY, values)).astype(np.float32)


def _window_name(window: int) -> str:
    return "all" if window == ALL_TIME else f"{window // DAY}d" if window % DAY == 0 else f"{window}s"
