"""Items that share a SID: keep them, number them, or move them to a free code of the last level."""

# N items, L levels, K codes of the last level, M SIDs, R rows that are not published
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.quantizers.last_level import LastDistances, move_last
from prerank_tools.quantizers.sid_keys import (
    group_starts,
    order_by_key,
    place_in_group,
    shared,
    unpack_codes,
)

Policy = Literal["keep", "suffix", "capacity", "sinkhorn", "optimal"]


@dataclass(frozen=True)
class Ledger:
    """The next free suffix of every SID that ever had one, so that a freed suffix is never given again."""

    key_M: np.ndarray  # int64, sorted
    next_M: np.ndarray  # int64

    @staticmethod
    def of(key_N: np.ndarray, suffix_N: np.ndarray) -> Ledger:
        """One past the largest suffix of every key."""
        order_N = np.argsort(key_N, kind="stable")
        key_N, suffix_N = key_N[order_N], suffix_N[order_N].astype(np.int64)
        starts_M = group_starts(key_N)
        next_M = np.maximum.reduceat(suffix_N, starts_M) + 1 if len(starts_M) else suffix_N
        return Ledger(key_N[starts_M], next_M)

    def merge(self, other: Ledger) -> Ledger:
        """The larger mark of the two for every key."""
        if not len(self.key_M) or not len(other.key_M):
            return self if len(self.key_M) else other
        # Mostly the same keys come again: marks are raised in place, and only the new keys move the rest.
        at_M = np.minimum(np.searchsorted(self.key_M, other.key_M), len(self.key_M) - 1)
        known_M = self.key_M[at_M] == other.key_M
        next_M = self.next_M.copy()
        next_M[at_M[known_M]] = np.maximum(next_M[at_M[known_M]], other.next_M[known_M])
        if known_M.all():
            return Ledger(self.key_M, next_M)
        key_M = np.concatenate([self.key_M, other.key_M[~known_M]])
        order_M = np.argsort(key_M, kind="stable")
        return Ledger(key_M[order_M], np.concatenate([next_M, other.next_M[~known_M]])[order_M])

    def next_free(self, key_N: np.ndarray) -> np.ndarray:
        """First suffix never given under each key (0 for an unseen key)."""
        if not len(self.key_M):
            return np.zeros(len(key_N), dtype=np.int64)
        at_N = np.minimum(np.searchsorted(self.key_M, key_N), len(self.key_M) - 1)
        return np.where(self.key_M[at_N] == key_N, self.next_M[at_N], 0)


EMPTY = Ledger(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class Resolved:
    """SIDs after a policy, each as one integer; the suffix of each item (policy `suffix`), what it took."""

    key_N: np.ndarray
    suffix_N: np.ndarray | None = None
    ledger: Ledger = EMPTY
    moved: int = 0
    unresolved: int = 0  # items left over capacity because no last code near them was free


def resolve(
    key_N: np.ndarray,
    ids_N: np.ndarray,
    *,
    sizes: Sequence[int],
    policy: Policy = "keep",
    distances: LastDistances | None = None,
    width: int = 256,
    capacity: int = 5,
    published_N: np.ndarray | None = None,
    suffix_N: np.ndarray | None = None,
    ledger: Ledger = EMPTY,
) -> Resolved:
    """Settle collisions of packed codes by one policy; a function of the set of items, whatever their order.

    `published_N` marks items whose SID (and `suffix_N`) stands and is never changed; `ledger` knows the
    suffixes ever given. `distances(rows)` gives squared distances of rows to all last-level codes, under
    the row's own prefix; policies that move items need it. Idempotent: the same items again change nothing.
    """
    if policy not in get_args(Policy):
        raise UsageError(f"unknown collision policy {policy!r}", "one of " + ", ".join(get_args(Policy)))
    if policy == "keep":
        return Resolved(key_N)
    if policy == "suffix":
        return _number(key_N, ids_N, sizes, width, published_N, suffix_N, ledger)
    if distances is None:
        raise UsageError(f"policy {policy} moves items, so it needs distances", "use keep or suffix")
    fixed_N = np.zeros(len(key_N), dtype=bool) if published_N is None else published_N.astype(bool)
    room = capacity if policy == "capacity" else 1
    out_N = move_last(key_N, ids_N, fixed_N, codes=sizes[-1], policy=policy, distances=distances, room=room)
    out_N += key_N - key_N % sizes[-1]
    size_M = np.diff(group_starts(np.sort(out_N)), append=len(out_N))
    crowded = int(np.maximum(size_M - room, 0).sum())
    return Resolved(out_N, moved=int((out_N != key_N).sum()), unresolved=crowded)


def _number(
    key_N: np.ndarray,
    ids_N: np.ndarray,
    sizes: Sequence[int],
    width: int,
    published_N: np.ndarray | None,
    suffix_N: np.ndarray | None,
    ledger: Ledger,
) -> Resolved:
    """TIGER's extra token: a running index, in item id order, among the items that share all codes."""
    out_N = np.zeros(len(key_N), dtype=np.int64)
    new_N = np.ones(len(key_N), dtype=bool)
    if published_N is not None and suffix_N is not None:
        new_N = ~published_N.astype(bool)
        np.copyto(out_N, suffix_N, where=~new_N)
        ledger = ledger.merge(Ledger.of(key_N[~new_N], out_N[~new_N]))
    # An item alone among the new ones of its SID is the next one there; only the others have an order.
    together_N = shared(key_N) & new_N
    alone_N = new_N & ~together_N
    out_N[alone_N] = ledger.next_free(key_N[alone_N])
    rows_R = np.flatnonzero(together_N)
    rows_R = rows_R[order_by_key(key_N[rows_R], ids_N[rows_R])]
    key_R = key_N[rows_R]
    out_N[rows_R] = ledger.next_free(key_R) + place_in_group(key_R)
    _refuse_wide(out_N, key_N, sizes, width)
    return Resolved(key_N, out_N, ledger.merge(Ledger.of(key_N, out_N)))


def _refuse_wide(suffix_N: np.ndarray, key_N: np.ndarray, sizes: Sequence[int], width: int) -> None:
    """A suffix past its declared width would be a token that the downstream vocabulary lacks."""
    if not len(suffix_N) or suffix_N.max() < width:
        return
    worst = int(suffix_N.argmax())
    codes_L = unpack_codes(key_N[worst : worst + 1], sizes)[0].tolist()
    raise ContractError(
        f"SID {codes_L} needs suffix {suffix_N[worst]}, the declared width is {width}",
        f"set the suffix width to {1 << int(suffix_N[worst]).bit_length()}, fit more codes or levels, "
        "or drop duplicate items first",
    )
