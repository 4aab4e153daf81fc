"""Draw the negatives of requests from what was known before each of them, the same every time."""
# n entries of a pool, R requests, k negatives a request; items are codes 0 .. I-1 in the order of their ids

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS_PER_NEGATIVE = 4  # a popular item is drawn again and again: one round mostly gives enough distinct ones
ROUNDS = 4


@dataclass(frozen=True)
class Pool:
    """Item codes in the order in which they became known; a request draws from the prefix before its time.

    With one entry an event the draw follows popularity as of the request, with one entry an item it is uniform.
    """

    item_n: np.ndarray
    known_n: np.ndarray

    def size_at(self, time_R: np.ndarray) -> np.ndarray:
        """Entries known strictly before each time."""
        return np.searchsorted(self.known_n, time_R, side="left")


def draw_negatives(
    pool: Pool, time_R: np.ndarray, *, keys_R: np.ndarray, positives: list[np.ndarray], count: int, seed: int
) -> list[np.ndarray]:
    """`count` distinct item codes for each request, none of them among its positives; fewer when no more are known.

    `keys_R` (uint64) names the request: its draws depend on it, on the seed and on the pool's prefix alone,
    so later events, other requests and the order of work change nothing.
    """
    sizes_R = pool.size_at(time_R)
    return [
        _draw(pool.item_n[:size], np.random.Philox(key=[seed, key]), forbidden, count)
        for size, key, forbidden in zip(sizes_R, keys_R, positives, strict=True)
    ]


def popularity_pool(item_n: np.ndarray, known_n: np.ndarray) -> Pool:
    """One entry an event: drawing from it follows the popularity of the log."""
    order = np.lexsort((item_n, known_n))
    return Pool(item_n[order], known_n[order])


def uniform_pool(popularity: Pool) -> Pool:
    """One entry an item, at the time it was first seen."""
    _, first_I = np.unique(popularity.item_n, return_index=True)
    first_I.sort()  # the pool is in time order, so the first place is the first time
    return Pool(popularity.item_n[first_I], popularity.known_n[first_I])


def catalogue_pool(items: int) -> Pool:
    """Every item of a catalogue, known from the beginning."""
    return Pool(np.arange(items), np.full(items, np.iinfo(np.int64).min))


def seen_before(pool: Pool, item_n: np.ndarray, time_n: np.ndarray) -> np.ndarray:
    """How often each item stands in the pool before its time: its popularity as of then, `int64 (n,)`."""
    if not len(pool.item_n):
        return np.zeros(len(item_n), dtype=np.int64)
    start, span = int(pool.known_n[0]), int(pool.known_n[-1]) - int(pool.known_n[0]) + 2
    key_n = np.sort(pool.item_n.astype(np.int64) * span + (pool.known_n - start))
    offset_n = np.clip(time_n - start, 0, span - 1)
    item_n = item_n.astype(np.int64) * span
    return np.searchsorted(key_n, item_n + offset_n) - np.searchsorted(key_n, item_n)


def shuffled(codes: np.ndarray, *, key: int, seed: int) -> np.ndarray:
    """Places of `codes`, sorted by id, in an order that depends on the request's key and the seed alone."""
    words = np.random.Philox(key=[seed + 1, key]).random_raw(len(codes))
    return np.argsort(codes, kind="stable")[np.argsort(words, kind="stable")]


def _draw(known: np.ndarray, bits: np.random.Philox, forbidden: np.ndarray, count: int) -> np.ndarray:
    chosen = np.empty(0, dtype=np.int64)
    for _ in range(ROUNDS if len(known) else 0):
        places = bits.random_raw(count * DRAWS_PER_NEGATIVE) % np.uint64(len(known))
        chosen = _first_seen(np.r_[chosen, known[places]], forbidden)[:count]
        if len(chosen) == count:
            return chosen
    # Fewer than `count` are left, or nearly: take the rest of what is known, in a drawn order.
    rest = _first_seen(known, np.r_[forbidden, chosen])
    rest = rest[np.argsort(bits.random_raw(len(rest)), kind="stable")]
    return np.r_[chosen, rest][:count].astype(np.int64)


def _first_seen(codes: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
    """Distinct codes in the order of their first place, without the forbidden ones."""
    distinct, first = np.unique(codes, return_index=True)
    keep = ~np.isin(distinct, forbidden)
    return codes[np.sort(first[keep])]
