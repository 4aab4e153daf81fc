"""Cross features: the same item and category before, unknowns have no past."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank_tools.features.crosses import CrossFeatures, PastLog
from prerank_tools.features.statistics import ALL_TIME, compress


def test_same_item_and_category_counts_golden() -> None:
    log = PastLog(
        user_E=np.array([0, 0, 0, 1]),
        item_E=np.array([5, 5, 6, 5]),
        time_E=np.array([10, 20, 30, 40]),
        category_E=np.array([1, 1, 1, 1]),
    )
    crosses = CrossFeatures(log, windows=(15, ALL_TIME))
    user, item, as_of = np.array([0, 0, 1]), np.array([5, 7, 5]), np.array([30, 31, 40])
    expected = [[1, 2, 10, 1, 2, 10], [0, 0, -1, 2, 3, 1], [0, 0, -1, 0, 0, -1]]
    actual = crosses.compute(user, item, as_of, np.array([1, 1, 1]))
    np.testing.assert_array_equal(actual, compress(np.array(expected)))
    assert actual.shape[1] == crosses.width == 6


def test_unknown_users_and_items_match_nothing() -> None:
    log = PastLog(np.array([-1, 0]), np.array([-1, -1]), np.array([1, 1]))
    actual = CrossFeatures(log, windows=(ALL_TIME,)).compute(
        np.array([-1, 0]), np.array([-1, -1]), np.array([9, 9])
    )
    np.testing.assert_array_equal(actual, compress(np.array([[0, -1], [0, -1]])))


def test_categories_are_asked_for_when_the_log_has_them() -> None:
    log = PastLog(np.array([0]), np.array([0]), np.array([1]), category_E=np.array([0]))
    with pytest.raises(ValueError, match="categories"):
        CrossFeatures(log).compute(np.array([0]), np.array([0]), np.array([2]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_later_events_never_change_a_request(seed: int) -> None:
    rng = np.random.default_rng(seed)
    user, item, time = (rng.integers(0, high, 40) for high in (3, 4, 100))
    query = (rng.integers(-1, 4, 15), rng.integers(-1, 5, 15))
    as_of = rng.integers(0, 100, 15)
    for t in np.unique(as_of):
        rows, seen = as_of == t, time < t
        whole = CrossFeatures(PastLog(user, item, time)).compute(query[0][rows], query[1][rows], as_of[rows])
        cut = CrossFeatures(PastLog(user[seen], item[seen], time[seen]))
        np.testing.assert_array_equal(whole, cut.compute(query[0][rows], query[1][rows], as_of[rows]))
