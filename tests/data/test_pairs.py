"""Pairs: the last search before a purchase, and partners inside a basket."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prerank_tools.data.pairs import bought_together, searched_then_bought


def match(rows: list[tuple[int, int, str]], window: int) -> list[tuple[int, int]]:
    key_n, time_n = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    kinds = [row[2] for row in rows]
    found, bought = searched_then_bought(
        key_n,
        time_n,
        search_n=np.array(["s" in kind for kind in kinds]),
        bought_n=np.array(["b" in kind for kind in kinds]),
        window=window,
    )
    return sorted(zip(found.tolist(), bought.tolist(), strict=True))


def test_a_purchase_belongs_to_the_last_search_of_its_key() -> None:
    rows = [(1, 10, "s"), (1, 20, "s"), (1, 25, "b"), (2, 26, "b"), (1, 19, "b")]
    assert match(rows, 100) == [(0, 4), (1, 2)]


def test_a_search_that_is_too_old_gives_no_pair() -> None:
    assert match([(1, 10, "s"), (1, 21, "b")], 10) == []
    assert match([(1, 10, "s"), (1, 20, "b")], 10) == [(0, 1)]


def test_a_purchase_with_its_own_query_is_its_own_search() -> None:
    assert match([(1, 10, "sb")], 0) == [(0, 0)]


def test_a_search_after_the_purchase_does_not_count() -> None:
    assert match([(1, 10, "b"), (1, 11, "s")], 100) == []


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.sampled_from(["s", "b", ""])), max_size=12),
    st.integers(0, 9),
)
def test_attribution_agrees_with_a_plain_search(rows: list[tuple[int, int, str]], window: int) -> None:
    if not rows:
        return
    expected = set()
    for bought, (key, time, kind) in enumerate(rows):
        if kind == "b":
            times = [t for k, t, what in rows if what == "s" and k == key and time - window <= t <= time]
            if times:
                expected.add((key, max(times), bought))
    found = {(rows[s][0], rows[s][1], b) for s, b in match(rows, window)}
    assert found == expected


def test_a_small_basket_gives_all_ordered_pairs() -> None:
    one, other = bought_together(np.array([0, 0, 0, 1]), np.arange(4), partners=5)
    assert sorted(zip(one.tolist(), other.tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 2),
        (2, 0),
        (2, 1),
    ]


def test_a_large_basket_gives_each_row_its_partners_and_no_square() -> None:
    rng = np.random.default_rng(0)
    one, other = bought_together(np.zeros(1000, dtype=int), rng.integers(0, 2**60, 1000), partners=4)
    assert np.bincount(one).tolist() == [4] * 1000
    assert np.bincount(other).tolist() == [4] * 1000
    assert (one != other).all()
    assert len(set(zip(one.tolist(), other.tolist(), strict=True))) == 4000
