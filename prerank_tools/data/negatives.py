"""Draw the negatives of requests from what was known before each of them, the same every time."""
# n entries of a pool, R requests, k negatives a request; items are codes 0 .. I-1 in the order of their ids

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS_PER_NEGATIVE = 4  # a popular item is drawn again and again: one round mostly gives enough distinct ones
ROUNDS = 4


@dataclass(frozen=True)
class Pool:
    """Item codes in the order they became known; a request draws from the prefix before its time.

    One entry an event: the draw follows popularity as of the request. One entry an item: it is uniform.
    """

    item_n: np.ndarray
    known_n: np.ndarray

    def size_at(self, time_R: np.ndarray) -> np.ndarray:
        """Entries known strictly before each time."""
        return np.searchsorted(self.known_n, time_R, side="left")


def draw_negatives(
    pool: Pool, time_R: np.ndarray, *, keys_R: np.ndarray, positives: list[np.ndarray], count: int, seed: int
) -> list[np.ndarray]:
    """`count` distinct item codes for each request, none of them a positive; fewer when no more are known.

    `keys_R` (uint64) names the request: its draws depend on it, on the seed and on the pool's prefix alone,
    so later events, other requests and the order of work change nothing.
    """
    sizes_R = pool.size_at(time_R)
    return [
        _draw(pool.item_n[:size], _bits(seed, key), forbidden, count)
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


@dataclass(frozen=True)
class Popularity:
    """How often an item was in a log before a time: one sorted key (item, time) an event."""

    key_n: np.ndarray
    start: int
    span: int

    @classmethod
    def of(cls, pool: Pool) -> Popularity:
        """Index a pool with one entry an event."""
        start = int(pool.known_n[0]) if len(pool.known_n) else 0
        span = int(pool.known_n[-1]) - start + 2 if len(pool.known_n) else 1
        return cls(np.sort(pool.item_n.astype(np.int64) * span + (pool.known_n - start)), start, span)

    def before(self, item_n: np.ndarray, time_n: np.ndarray) -> np.ndarray:
        """Events of each item before its time, `int64 (n,)`."""
        first_n = np.asarray(item_n, dtype=np.int64) * self.span
        offset_n = np.clip(time_n - self.start, 0, self.span - 1)
        return np.searchsorted(self.key_n, first_n + offset_n) - np.searchsorted(self.key_n, first_n)


def shuffled(codes: np.ndarray, *, key: int, seed: int) -> np.ndarray:
    """Places of `codes`, sorted by id, in an order that depends on the request's key and the seed alone."""
    words = _bits(seed + 1, key).random_raw(len(codes))
    return np.argsort(codes, kind="stable")[np.argsort(words, kind="stable")]


def _bits(seed: int, key: int) -> np.random.Philox:
    # An array: a list of a small and a large number passes through float64 and loses the key's last bits.
    return np.random.Philox(key=np.array([seed, key], dtype=np.uint64))


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
