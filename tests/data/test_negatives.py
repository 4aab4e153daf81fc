"""Negatives: drawn from what was known, never bought, the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank_tools.data.negatives import (
    Pool,
    Popularity,
    catalogue_pool,
    draw_negatives,
    popularity_pool,
    shuffled,
    uniform_pool,
)


def draw(
    pool: Pool, time: int, positives: list[int], count: int, *, key: int = 7, seed: int = 0
) -> list[int]:
    drawn = draw_negatives(
        pool,
        np.array([time]),
        keys_R=np.array([key], dtype=np.uint64),
        positives=[np.array(positives)],
        count=count,
        seed=seed,
    )
    return [int(code) for code in drawn[0]]


def test_draws_are_golden() -> None:
    # Stored requests must come out the same next year: Philox's raw bits are fixed.
    pool = popularity_pool(np.arange(100) % 10, np.arange(100))
    assert draw(pool, 100, [3], 4) == [2, 4, 0, 7]
    assert draw(pool, 100, [3], 4, seed=1) != [2, 4, 0, 7]


def test_neighbouring_keys_draw_apart() -> None:
    # Keys use all 64 bits: two that a float64 cannot tell apart must not draw the same.
    pool = catalogue_pool(10_000)
    assert draw(pool, 0, [], 5, key=2**63 + 1) != draw(pool, 0, [], 5, key=2**63 + 2)


def test_later_events_change_nothing() -> None:
    items, known = np.arange(100) % 10, np.arange(100)
    assert draw(popularity_pool(items, known), 50, [1], 5) == draw(
        popularity_pool(items[:50], known[:50]), 50, [1], 5
    )


def test_only_items_known_before_the_request_are_drawn() -> None:
    pool = popularity_pool(np.array([0, 1, 2, 3]), np.array([10, 20, 30, 40]))
    assert sorted(draw(pool, 30, [], 9)) == [0, 1]
    assert draw(pool, 10, [], 9) == []
    assert sorted(draw(uniform_pool(pool), 31, [1], 9)) == [0, 2]
    assert sorted(draw(catalogue_pool(4), -5, [2], 9)) == [0, 1, 3]


def test_popularity_negatives_follow_the_log_and_uniform_ones_do_not() -> None:
    items = np.r_[np.zeros(900, dtype=int), np.arange(1, 101)]  # item 0 has 90 % of the events
    pool = popularity_pool(items, np.zeros(1000))
    first = [draw(pool, 1, [], 1, key=key)[0] for key in range(500)]
    assert 0.85 < np.mean(np.array(first) == 0) < 0.95
    first = [draw(uniform_pool(pool), 1, [], 1, key=key)[0] for key in range(500)]
    assert np.mean(np.array(first) == 0) < 0.05


@settings(deadline=None)
@given(
    events=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 20)), min_size=1, max_size=40),
    time=st.integers(0, 21),
    positives=st.sets(st.integers(0, 8)),
    count=st.integers(1, 12),
    key=st.integers(0, 2**64 - 1),
)
def test_negatives_are_known_distinct_never_positive_and_complete(
    events: list[tuple[int, int]], time: int, positives: set[int], count: int, key: int
) -> None:
    items, known = np.array(events).T
    pool = popularity_pool(items, known)
    for source in (pool, uniform_pool(pool)):
        drawn = draw(source, time, sorted(positives), count, key=key)
        possible = {item for item, when in events if when < time} - positives
        assert set(drawn) <= possible
        assert len(drawn) == len(set(drawn)) == min(count, len(possible))
        assert drawn == draw(source, time, sorted(positives), count, key=key)


@given(
    events=st.lists(st.tuples(st.integers(0, 5), st.integers(-30, 30)), min_size=1),
    asked=st.lists(st.tuples(st.integers(0, 9), st.integers(-40, 40)), min_size=1),
)
def test_popularity_counts_what_was_before(
    events: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    items, known = np.array(events).T
    popularity = Popularity.of(popularity_pool(items, known))
    counts = popularity.before(*np.array(asked).T)
    assert counts.tolist() == [sum(i == item and t < time for i, t in events) for item, time in asked]


@pytest.mark.parametrize("arrangement", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_the_order_of_candidates_does_not_tell_the_positive(arrangement: list[int]) -> None:
    codes = np.array([10, 20, 30, 40])[arrangement]
    order = shuffled(codes, key=5, seed=0)
    assert sorted(order) == [0, 1, 2, 3]
    assert codes[order].tolist() == shuffled_codes()


def shuffled_codes() -> list[int]:
    codes = np.array([10, 20, 30, 40])
    return [int(code) for code in codes[shuffled(codes, key=5, seed=0)]]
