"""Histories: strictly before, known before, newest kept; baskets; digests that change when histories do."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prerank_tools.users import histories
from prerank_tools.users.histories import Catalogue, Histories, Log

CATALOGUE = Catalogue(np.array([3, 1, 2, 0]), np.array([[1, 0], [0, 1], [0, 0], [0, 0]], np.float32))


def log_of(users: list[int], times: list[int], known: list[int] | None = None, **columns: list[int]) -> Log:
    count = len(users)
    return Log(
        user_N=np.array(users, dtype=np.int64),
        item_N=np.array(columns.get("items", [0] * count), dtype=np.int64),
        time_N=np.array(times, dtype=np.int64),
        known_N=np.array(known or times, dtype=np.int64),
        action_N=np.zeros(count, dtype=np.int64),
        surface_N=np.zeros(count, dtype=np.int64),
        meta_NM=np.zeros((count, 2), dtype=np.float32),
    )


def rows_at(log: Log, user: int, at: int, limit: int = 99) -> list[int]:
    return histories.as_of(log, np.array([user]), np.array([at]), limit=limit).rows[0].tolist()


def test_history_is_strictly_before_and_keeps_the_newest() -> None:
    log = log_of([0, 0, 0, 1, 1], [10, 20, 20, 5, 30])
    assert rows_at(log, 0, 20) == [0]
    assert rows_at(log, 0, 21) == [0, 1, 2]
    assert rows_at(log, 0, 21, limit=2) == [1, 2]
    assert rows_at(log, 1, 5) == []
    found = histories.as_of(log, np.array([0]), np.array([99]), limit=2)
    assert found.count_S.tolist() == [3]  # counted before the cut


def test_late_event_joins_when_it_is_known() -> None:
    log = log_of([0, 0], [10, 20], known=[50, 20])
    assert rows_at(log, 0, 30) == [1]
    assert rows_at(log, 0, 50) == [1]
    assert rows_at(log, 0, 51) == [0, 1]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(0, 10)), min_size=1, max_size=30),
    st.integers(0, 3),
    st.integers(0, 35),
    st.integers(1, 5),
)
def test_history_against_a_filter(rows: list[tuple[int, int, int]], user: int, at: int, limit: int) -> None:
    rows = sorted([*rows, *((u, 0, 0) for u in range(4))])
    log = log_of([r[0] for r in rows], [r[1] for r in rows], known=[r[1] + r[2] for r in rows])
    expected = [i for i, (u, t, late) in enumerate(rows) if u == user and t < at and t + late < at]
    assert rows_at(log, user, at, limit) == expected[-limit:]


def test_baskets_end_after_a_silence() -> None:
    log = log_of([0, 0, 0, 0, 1], [10, 10, 40, 100, 100])
    found = histories.baskets(log, gap=30)
    assert [r.tolist() for r in found.rows] == [[0, 1, 2], [3], [4]]
    assert found.start_S.tolist() == [10, 100, 100]
    assert found.user_S.tolist() == [0, 0, 1]
    assert [r.tolist() for r in histories.baskets(log, gap=0).rows] == [[0, 1], [2], [3], [4]]


def test_named_baskets_start_with_their_first_event() -> None:
    log = log_of([0, 0, 0], [10, 20, 30])
    found = histories.baskets(log, gap=0, basket_N=np.array([1, 0, 1]))
    assert [r.tolist() for r in found.rows] == [[0, 2], [1]]
    assert found.start_S.tolist() == [10, 20]


def test_newest_baskets_of_each_user() -> None:
    assert histories.newest_per_user(np.array([0, 0, 0, 1, 2, 2]), limit=2).tolist() == [1, 2, 3, 4, 5]


def test_digest_changes_with_anything_a_vector_depends_on() -> None:
    def digest(log: Log, rows: list[int], catalogue: Catalogue = CATALOGUE, count: int = 2) -> int:
        found = histories.digest(log, catalogue, Histories([np.array(rows)], np.array([count])))
        return int(found[0])

    log = log_of([0, 0, 0], [10, 20, 30], items=[0, 1, 2])
    edited = Catalogue(CATALOGUE.bucket_I, CATALOGUE.content_IC + 1)
    base = digest(log, [0, 1])
    assert digest(log, [0, 1]) == base
    others = [
        digest(log, [1, 0]),
        digest(log, [0, 2]),
        digest(log, [0]),
        digest(log, [0, 1], count=3),
        digest(log, [0, 1], edited),
        digest(log_of([0, 0, 0], [10, 21, 30], items=[0, 1, 2]), [0, 1]),
    ]
    assert base not in others and len(set(others)) == len(others)


def test_digest_does_not_depend_on_the_rest_of_the_log() -> None:
    short, long = log_of([0, 0], [10, 20], items=[0, 1]), log_of([0, 0, 0], [5, 10, 20], items=[2, 0, 1])
    one = histories.digest(short, CATALOGUE, Histories([np.array([0, 1])], np.array([2])))
    two = histories.digest(long, CATALOGUE, Histories([np.array([1, 2])], np.array([2])))
    assert one == two
