"""Pair what was searched with what was bought, and what was bought together."""
# n events or rows, P pairs; every result is places into the rows it was given

from __future__ import annotations

import numpy as np


def searched_then_bought(
    key_n: np.ndarray, time_n: np.ndarray, *, search_n: np.ndarray, bought_n: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """(searches, purchases), each `int64 (P,)`: every purchase with the latest search of the same key.

    A key is one user's interest in one item. The search came at most `window` seconds before, or is the
    purchase's own row; a purchase without one gives no pair (last-touch attribution, ours).
    """
    order = np.lexsort((~search_n, time_n, key_n))  # at one time the search comes first
    key, time, search = key_n[order], time_n[order], search_n[order]
    last = np.maximum.accumulate(np.where(search, np.arange(len(order)), -1))
    found = bought_n[order] & (last >= 0)
    found[found] &= (key[last[found]] == key[found]) & (time[found] - time[last[found]] <= window)
    return order[last[found]], order[found]


def bought_together(
    basket_n: np.ndarray, word_n: np.ndarray, *, partners: int
) -> tuple[np.ndarray, np.ndarray]:
    """(one, other), each `int64 (P,)`: rows of one basket, each with at most `partners` others of it.

    A basket lies on a circle in the order of `word_n` (random bits that belong to the row) and each row takes
    the next ones: all ordered pairs of a small basket, and no square of a large one (ours).
    """
    order = np.lexsort((word_n, basket_n))
    basket = basket_n[order]
    starts = np.flatnonzero(np.r_[True, basket[1:] != basket[:-1]][: len(basket)])
    size = np.diff(np.r_[starts, len(basket)])
    start_n, size_n = np.repeat(starts, size), np.repeat(size, size)
    place_n = np.arange(len(basket)) - start_n
    ones, others = [], []
    for step in range(1, partners + 1):
        row = np.flatnonzero(step < size_n)
        ones.append(order[row])
        others.append(order[start_n[row] + (place_n[row] + step) % size_n[row]])
    return np.concatenate(ones), np.concatenate(others)
