"""How a catalogue sits on its SIDs: collisions, use of every level, reconstruction; exact and streamed."""

# N items, L levels, K codes of a level, M distinct SIDs, D dims
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from prerank_tools.quantizers.sid_keys import group_starts, pack_codes

BUFFER = 4_000_000  # keys held before they are folded into counts


@dataclass(frozen=True)
class LevelUse:
    """Use of one level over the whole catalogue; entropy is normalised by log K."""

    codes: int
    used: int
    dead: int
    perplexity: float
    entropy: float
    largest_share: float  # of all items on the level's fullest code
    prefixes: int  # distinct prefixes down to this level


@dataclass(frozen=True)
class SidUse:
    """Collisions and leaf counts over the whole catalogue.

    `collision_rate` = 1 - SIDs / items (LC-Rec); `exclusive_items` is the share of items alone on their SID,
    `exclusive_sids` the share of SIDs with one item; Gini is over the item counts of the SIDs in use.
    """

    items: int
    sids: int
    collision_rate: float
    exclusive_items: float
    exclusive_sids: float
    largest_sid: int
    gini: float
    levels: tuple[LevelUse, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass
class SidCounts:
    """Exact counts of codes and SIDs; `update` with batches, `finalize` once. 8 bytes an item at most."""

    sizes: Sequence[int]
    _levels: list[np.ndarray] = field(init=False)
    _buffer: list[np.ndarray] = field(init=False, default_factory=list)
    _held: int = 0
    _key_M: np.ndarray = field(init=False, default_factory=lambda: np.zeros(0, dtype=np.int64))
    _count_M: np.ndarray = field(init=False, default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        self._levels = [np.zeros(size, dtype=np.int64) for size in self.sizes]

    def update(self, codes_NL: np.ndarray) -> None:
        """Count a batch."""
        key_N = pack_codes(codes_NL, self.sizes)
        for level, count_K in enumerate(self._levels):
            count_K += np.bincount(codes_NL[:, level], minlength=len(count_K))
        self._buffer.append(key_N)
        self._held += len(key_N)
        if self._held >= BUFFER:
            self._fold()

    def keys(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct SIDs as sorted keys (M,) and the number of items on each (M,)."""
        self._fold()
        return self._key_M, self._count_M

    def finalize(self) -> SidUse:
        """Every number of the catalogue so far."""
        key_M, count_M = self.keys()
        items = int(count_M.sum())
        single = int((count_M == 1).sum())
        return SidUse(
            items=items,
            sids=len(key_M),
            collision_rate=1 - len(key_M) / max(items, 1),
            exclusive_items=single / max(items, 1),
            exclusive_sids=single / max(len(key_M), 1),
            largest_sid=int(count_M.max(initial=0)),
            gini=gini(count_M),
            levels=tuple(self._level(level, key_M) for level in range(len(self.sizes))),
        )

    def _fold(self) -> None:
        if not self._buffer:
            return
        key_N, count_N = np.unique(np.concatenate(self._buffer), return_counts=True)
        key_N = np.concatenate([self._key_M, key_N])
        order_N = np.argsort(key_N, kind="stable")
        starts_M = group_starts(key_N[order_N])
        self._count_M = np.add.reduceat(np.concatenate([self._count_M, count_N])[order_N], starts_M)
        self._key_M = key_N[order_N][starts_M]
        self._buffer, self._held = [], 0

    def _level(self, level: int, key_M: np.ndarray) -> LevelUse:
        count_K = self._levels[level]
        share_K = count_K[count_K > 0] / max(count_K.sum(), 1)
        entropy = float(-(share_K * np.log(share_K)).sum())
        radix = int(np.prod([int(size) for size in self.sizes[level + 1 :]], dtype=object))
        return LevelUse(
            codes=len(count_K),
            used=len(share_K),
            dead=len(count_K) - len(share_K),
            perplexity=float(np.exp(entropy)),
            entropy=entropy / np.log(len(count_K)) if len(count_K) > 1 else 1.0,
            largest_share=float(share_K.max(initial=0)),
            prefixes=len(group_starts(key_M // radix)),
        )


def gini(count_M: np.ndarray) -> float:
    """Gini coefficient of counts: 0 where all are equal, near 1 where one holds everything."""
    if not len(count_M) or not count_M.sum():
        return 0.0
    sorted_M = np.sort(count_M).astype(np.float64)
    rank_M = np.arange(1, len(sorted_M) + 1)
    return float((2 * rank_M - len(sorted_M) - 1) @ sorted_M / (len(sorted_M) * sorted_M.sum()))


@dataclass
class Reconstruction:
    """Relative error sum ||x - x_hat||^2 / sum ||x||^2 and mean cosine, summed in float64 over batches."""

    items: int = 0
    error: float = 0.0
    energy: float = 0.0
    cosine: float = 0.0

    def update(self, x_ND: np.ndarray, decoded_ND: np.ndarray) -> None:
        """Add a batch of vectors and what their codes decode to."""
        x_ND, decoded_ND = x_ND.astype(np.float64), decoded_ND.astype(np.float64)
        length_N = np.linalg.norm(x_ND, axis=1) * np.linalg.norm(decoded_ND, axis=1)
        self.items += len(x_ND)
        self.error += float(((x_ND - decoded_ND) ** 2).sum())
        self.energy += float((x_ND**2).sum())
        self.cosine += float(((x_ND * decoded_ND).sum(axis=1) / np.maximum(length_N, 1e-30)).sum())

    def finalize(self) -> dict[str, float]:
        """`relative_error` and `cosine`."""
        return {
            "relative_error": self.error / max(self.energy, 1e-30),
            "cosine": self.cosine / max(self.items, 1),
        }
