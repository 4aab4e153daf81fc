"""A basket is held out whole."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prerank_tools.data.baskets import earliest, held_out, latest


def test_a_basket_across_the_cut_is_held_out_whole() -> None:
    basket_n = np.array([0, 0, 1, 1, 2])
    time_n = np.array([10, 11, 19, 21, 30])
    assert held_out(basket_n, time_n, at=20).tolist() == [False, False, True, True, True]


def test_the_cut_itself_belongs_to_test() -> None:
    assert held_out(np.array([0, 1]), np.array([19, 20]), at=20).tolist() == [False, True]


def test_first_and_last_time_of_each_basket() -> None:
    basket_n, time_n = np.array([1, 0, 1, 0]), np.array([5, -7, 3, -2])
    assert earliest(basket_n, time_n).tolist() == [-7, 3]
    assert latest(basket_n, time_n).tolist() == [-2, 5]


def test_no_events_give_no_baskets() -> None:
    empty = np.empty(0, dtype=np.int64)
    assert held_out(empty, empty, at=0).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 100)), min_size=1), st.integers(0, 100))
def test_no_basket_straddles_and_nothing_late_is_left_in(rows: list[tuple[int, int]], at: int) -> None:
    labels, time_n = np.array(rows).T
    basket_n = np.unique(labels, return_inverse=True)[1]
    test_n = held_out(basket_n, time_n, at=at)
    for basket in np.unique(basket_n):
        assert len(set(test_n[basket_n == basket])) == 1
    assert (time_n[~test_n] < at).all()
    for basket in np.unique(basket_n[test_n]):  # nothing is held out without a reason
        assert time_n[basket_n == basket].max() >= at
