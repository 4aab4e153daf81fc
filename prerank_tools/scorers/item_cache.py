"""Item cache: what the item tower made of an item, kept per (item, tower version, feature version).

Statistics never enter it: they change while the item does not. `W_i` in the upper network and the cached
product belong to one model, so vectors are only ever handed out for the version that asks; another version
finds the cache empty, and the swap is one assignment.
"""

# n candidates, m misses, S slots, R record width
from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheVersion:
    """Versions a cached record is valid for."""

    tower: str
    features: str


@dataclass
class _Slab:
    """One version's records in one block, with an id -> slot map and when each slot was last read."""

    version: CacheVersion
    records_SR: Tensor
    slot_of: dict[int, int] = field(default_factory=dict)
    item_of_S: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    used_S: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


class ItemCache:
    """Bounded store of item records; misses are computed in one call, the least recently read leave."""

    def __init__(self, width: int, *, capacity: int = 1 << 20, device: str = "cpu") -> None:
        if capacity < 1:
            raise ValueError("a cache holds at least one record")
        self.width, self.capacity, self.device = width, capacity, device
        self.hits = self.misses = self._tick = 0
        self._lock = threading.Lock()
        self._slab: _Slab | None = None

    def records(
        self, version: CacheVersion, items_n: np.ndarray, compute: Callable[[np.ndarray], Tensor]
    ) -> Tensor:
        """Records [n, R] of `items_n` under `version`; `compute(items_m)` makes those that are missing."""
        unique_u, inverse_n = np.unique(np.asarray(items_n, dtype=np.int64), return_inverse=True)
        with self._lock:
            slab = self._slab_of(version)
            slots_u = np.array([slab.slot_of.get(item, -1) for item in unique_u.tolist()], dtype=np.int64)
            missing_u = slots_u < 0
            rows_uR = torch.empty((len(unique_u), self.width), device=self.device)
            rows_uR[torch.from_numpy(~missing_u)] = slab.records_SR[torch.from_numpy(slots_u[~missing_u])]
            self._tick += 1
            slab.used_S[slots_u[~missing_u]] = self._tick
            self.hits += int((~missing_u).sum())
            self.misses += int(missing_u.sum())
            if missing_u.any():
                fresh_mR = compute(unique_u[missing_u]).detach().to(rows_uR)
                rows_uR[torch.from_numpy(missing_u)] = fresh_mR
                self._store(slab, unique_u[missing_u], fresh_mR)
        return rows_uR.index_select(0, torch.from_numpy(inverse_n.reshape(-1)).to(self.device))

    def __len__(self) -> int:
        return len(self._slab.slot_of) if self._slab else 0

    def _slab_of(self, version: CacheVersion) -> _Slab:
        if self._slab is None or self._slab.version != version:
            self._slab = _Slab(version, torch.empty((0, self.width), device=self.device))
        return self._slab

    def _store(self, slab: _Slab, items_m: np.ndarray, records_mR: Tensor) -> None:
        items_m, records_mR = items_m[-self.capacity :], records_mR[-self.capacity :]
        slots_m = self._free_slots(slab, len(items_m))
        for old in slab.item_of_S[slots_m].tolist():
            slab.slot_of.pop(old, None)
        slab.item_of_S[slots_m], slab.used_S[slots_m] = items_m, self._tick
        slab.records_SR[torch.from_numpy(slots_m)] = records_mR
        slab.slot_of.update(zip(items_m.tolist(), slots_m.tolist(), strict=True))

    def _free_slots(self, slab: _Slab, wanted: int) -> np.ndarray:
        """Slots to write to: new ones while the slab may grow, then those that were read longest ago."""
        size, taken = len(slab.item_of_S), len(slab.slot_of)
        if taken + wanted > size and size < self.capacity:
            size = min(self.capacity, max(taken + wanted, 2 * size))
            grown = torch.zeros((size, self.width), device=self.device)
            grown[: len(slab.records_SR)] = slab.records_SR
            slab.records_SR = grown
            slab.item_of_S = _grow(slab.item_of_S, size, _NO_ITEM)
            slab.used_S = _grow(slab.used_S, size, 0)
        return np.argsort(slab.used_S, kind="stable")[:wanted]


_NO_ITEM = np.iinfo(np.int64).min


def _grow(values_S: np.ndarray, size: int, fill: int) -> np.ndarray:
    return np.concatenate([values_S, np.full(size - len(values_S), fill, dtype=np.int64)])
