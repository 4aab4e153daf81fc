"""Item cache: one version at a time, misses in one call, bounded, never a stale record."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank_tools.scorers.item_cache import CacheVersion, ItemCache

V1, V2 = CacheVersion("tower-1", "features-1"), CacheVersion("tower-2", "features-1")


class Tower:
    """Stands for an item tower: its record is (item, version), and it remembers what it was asked."""

    def __init__(self, version: int) -> None:
        self.version, self.calls = version, []

    def __call__(self, items_m: np.ndarray) -> torch.Tensor:
        self.calls.append(items_m.tolist())
        return torch.stack(
            [torch.from_numpy(items_m).float(), torch.full((len(items_m),), float(self.version))], dim=1
        )


def test_misses_are_computed_once_and_in_one_call() -> None:
    cache, tower = ItemCache(2), Tower(1)
    records = cache.records(V1, np.array([7, 3, 7]), tower)
    assert records.tolist() == [[7, 1], [3, 1], [7, 1]]
    cache.records(V1, np.array([3, 4]), tower)
    assert tower.calls == [[3, 7], [4]]
    assert (cache.misses, cache.hits, len(cache)) == (3, 1, 3)


def test_a_new_tower_or_new_features_never_see_old_records() -> None:
    cache = ItemCache(2)
    cache.records(V1, np.array([1]), Tower(1))
    for number, version in ((2, V2), (3, CacheVersion("tower-2", "features-2")), (4, V1)):
        assert cache.records(version, np.array([1]), Tower(number)).tolist() == [[1, number]]


def test_least_recently_read_items_leave_first() -> None:
    cache, tower = ItemCache(2, capacity=3), Tower(1)
    for items in ([1, 2, 3], [1, 3], [4]):
        cache.records(V1, np.array(items), tower)
    tower.calls.clear()
    cache.records(V1, np.array([1, 2, 3, 4]), tower)
    assert tower.calls == [[2]]
    assert len(cache) == 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-5, 20), min_size=1, max_size=12), max_size=12), st.integers(1, 6))
def test_records_are_right_at_any_capacity(calls: list[list[int]], capacity: int) -> None:
    cache, tower = ItemCache(2, capacity=capacity), Tower(1)
    for items in calls:
        records = cache.records(V1, np.array(items), tower)
        assert records[:, 0].tolist() == items
        assert len(cache) <= capacity
