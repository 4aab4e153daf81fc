"""Counts as of T: strictly past, late rows when they arrive, the future never shows."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank_tools.features.statistics import (
    ALL_TIME,
    DAY,
    PastCounts,
    compress,
    day_of,
    statistic_names,
    statistics,
)

WINDOWS = (10, 50, ALL_TIME)


def brute_force(keys: np.ndarray, times: np.ndarray, visible: np.ndarray, key: int, as_of: int) -> list[int]:
    seen = (keys == key) & (times < as_of) & (visible < as_of)
    counts = [int((seen & (times >= as_of - w)).sum()) if w else int(seen.sum()) for w in WINDOWS]
    return [*counts, int(as_of - times[seen].max()) if seen.any() else -1]


def test_counts_are_strictly_before_t() -> None:
    past = PastCounts(np.array([1, 1, 1]), np.array([100, 200, 300]), windows=(ALL_TIME,))
    as_of = np.array([100, 101, 200, 300, 301])
    assert past.counts(np.ones(5), as_of)[:, 0].tolist() == [0, 1, 1, 2, 3]
    assert past.recency(np.ones(5), as_of).tolist() == [-1, 1, 100, 100, 1]


def test_windows_start_at_t_minus_w() -> None:
    past = PastCounts(np.array([1, 1]), np.array([100, 150]), windows=(100, 50))
    assert past.counts(np.array([1, 1]), np.array([200, 201])).tolist() == [[2, 1], [1, 0]]


def test_a_late_row_counts_only_once_it_has_arrived() -> None:
    past = PastCounts(np.array([1]), np.array([100]), np.array([500]), windows=(300, 450, ALL_TIME))
    counts = past.counts(np.ones(3), np.array([400, 500, 501]))
    assert counts.tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 1]]  # at 501 it is already 401 seconds old


def test_unknown_keys_and_an_empty_log_have_no_past() -> None:
    nothing = PastCounts(np.zeros(0, int), np.zeros(0, int), windows=WINDOWS)
    for past in (nothing, PastCounts(np.array([5]), np.array([1]), windows=WINDOWS)):
        assert statistics(past, np.array([7]), np.array([100])).tolist() == [[0, 0, 0, -1]]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 40))
def test_statistics_equal_brute_force(seed: int, events: int) -> None:
    rng = np.random.default_rng(seed)
    keys, times = rng.integers(-2, 4, events), rng.integers(0, 120, events)
    visible = times + rng.integers(0, 60, events) * rng.integers(0, 2, events)
    query, as_of = rng.integers(-3, 5, 25), rng.integers(-5, 200, 25)
    actual = statistics(PastCounts(keys, times, visible, windows=WINDOWS), query, as_of)
    expected = [brute_force(keys, times, visible, k, t) for k, t in zip(query, as_of, strict=True)]
    np.testing.assert_array_equal(actual, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_later_events_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys, times = rng.integers(0, 3, 30), rng.integers(0, 100, 30)
    query, as_of = rng.integers(0, 4, 10), rng.integers(0, 100, 10)
    past_only = times < as_of.max()
    future_keys, future_times = rng.integers(0, 6, 20), rng.integers(as_of.max(), 10**9, 20)
    with_future = PastCounts(np.r_[keys, future_keys], np.r_[times, future_times])
    without = PastCounts(keys[past_only], times[past_only])
    np.testing.assert_array_equal(statistics(with_future, query, as_of), statistics(without, query, as_of))


def test_names_and_compression() -> None:
    assert statistic_names() == ("count_1d", "count_7d", "count_30d", "count_all", "recency_s")
    np.testing.assert_allclose(compress(np.array([[0, 1]])), [[0.0, np.log(2.0)]], rtol=1e-6)
    assert compress(np.array([-1]))[0] > compress(np.array([5 * 365 * DAY]))[0]  # never is the oldest


def test_the_as_of_of_a_day_is_never_later_than_the_request() -> None:
    assert day_of(np.array([0, DAY - 1, DAY, DAY + 5])).tolist() == [0, 0, DAY, DAY]
