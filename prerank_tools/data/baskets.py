"""Cut a log in time without cutting a basket in two."""
# n events, B baskets (numbered 0 .. B-1 in `basket_n`)

from __future__ import annotations

import numpy as np


def held_out(basket_n: np.ndarray, time_n: np.ndarray, *, at: int) -> np.ndarray:
    """True for every event of a basket that has an event at or after `at` (epoch seconds).

    A basket that lies across the cut is held out whole: left in, it would put times from after the cut
    into training; cut in two, its first half would give its second half away (ours).
    """
    return np.asarray(latest(basket_n, time_n)[basket_n] >= at)


def earliest(basket_n: np.ndarray, time_n: np.ndarray) -> np.ndarray:
    """First time of every basket, `int64 (B,)`."""
    return -latest(basket_n, -np.asarray(time_n, dtype=np.int64))


def latest(basket_n: np.ndarray, time_n: np.ndarray) -> np.ndarray:
    """Last time of every basket, `int64 (B,)`."""
    last_B = np.full(int(basket_n.max(initial=-1)) + 1, np.iinfo(np.int64).min)
    np.maximum.at(last_B, basket_n, time_n)
    return last_B
