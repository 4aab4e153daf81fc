"""Requests in either form, the past of a user as of T, vectors joined as of T."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from prerank_tools.errors import ContractError
from prerank_tools.scorers.item_frames import Catalogue, codes_of
from prerank_tools.scorers.packing import ItemArrays
from prerank_tools.scorers.past_frames import (
    mean_history,
    read_past,
    stored_simtier,
    stored_statistics,
    user_vectors,
)
from prerank_tools.scorers.request_frames import flatten, labels_of

LISTS = pl.DataFrame(
    {
        "request_id": [2, 1],
        "user_id": ["乙", "甲"],
        "timestamp": [20, 10],
        "candidates": [[9, 3], [5]],
        "label_click": [[1, 0], [None]],
    }
)


def test_lists_and_flat_rows_become_the_same() -> None:
    lists = flatten(LISTS)
    flat = flatten(LISTS.explode("candidates", "label_click").rename({"candidates": "item_id"})[::-1])
    assert lists.candidates.equals(flat.candidates) and lists.requests.equals(flat.requests)
    assert lists.candidates["item_id"].to_list() == [5, 3, 9]
    assert lists.offset_R.tolist() == [0, 1, 3] and lists.request_n.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(labels_of(lists, ("click", "like"))[:, 0], [np.nan, 0, 1])
    assert np.isnan(labels_of(lists, ("click", "like"))[:, 1]).all()


def test_a_request_without_candidates_is_left_out() -> None:
    empty = LISTS.with_columns(pl.Series("candidates", [[9, 3], []]), pl.Series("label_click", [[1, 0], []]))
    assert flatten(empty).requests["request_id"].to_list() == [2]


def test_a_repeated_candidate_and_labels_of_another_length_are_refused() -> None:
    with pytest.raises(ContractError, match="more than once"):
        flatten(LISTS.with_columns(pl.Series("candidates", [[9, 9], [5]])))
    with pytest.raises(ContractError, match="label_click"):
        flatten(LISTS.with_columns(pl.Series("label_click", [[1], [0]])))


def catalogue() -> Catalogue:
    """Items 1, 2, 3 with vectors (1, 0), (0, 1) and none."""
    content = np.array([[1, 0], [0, 1], [0, 0], [0, 0]], dtype=np.float32)
    arrays = ItemArrays(content, np.array([[0], [1], [1], [-1]]))
    blocks = {"content": 2}
    return Catalogue(
        pl.Series([1, 2, 3]), content, arrays, blocks, {"category": 2}, {"category": ("a", "b")}, 0
    )


EVENTS = pl.DataFrame(
    {
        "user_id": [7, 7, 7, 8, 7],
        "item_id": [1, 2, 3, 1, 1],
        "timestamp": [10, 20, 30, 15, 5],
        "ingested_at": [10, 50, 30, 15, 5],
    }
)


def test_history_is_the_newest_that_is_known_strictly_before() -> None:
    past = read_past(EVENTS, catalogue())
    as_of = np.array([5, 10, 11, 31, 51, 51])
    user = past.user_codes(pl.Series([7, 7, 7, 7, 7, 9]))
    seen = past.visible(user, as_of)
    assert seen.tolist() == [0, 1, 2, 3, 4, 0]  # the event of time 20 is known from 50 on
    mean = mean_history(past, catalogue(), user, seen, newest=3)
    expected = [
        [0, 0],
        [1, 0],
        [1, 0],
        [1, 0],
        [0.5, 0.5],
        [0, 0],
    ]  # item 3 has no vector and does not dilute
    np.testing.assert_allclose(mean, expected)


def test_user_vectors_are_the_latest_not_after_the_request() -> None:
    users = pl.DataFrame({"user_id": [1, 1, 2], "as_of": [10, 20, 15]}).with_columns(
        pl.Series("embedding", np.array([[1, 1], [2, 2], [3, 3]], dtype=np.float16))
    )
    requests = pl.DataFrame({"user_id": [1, 1, 1, 2, 3], "timestamp": [25, 20, 9, 15, 99]})
    found = user_vectors(users, requests)
    assert found.tolist() == [[2, 2, 1], [2, 2, 1], [0, 0, 0], [3, 3, 1], [0, 0, 0]]


def test_stored_statistics_take_the_latest_day_and_no_past_for_the_rest() -> None:
    features = pl.DataFrame({"user_id": [1, 1], "as_of": [10, 20]}).with_columns(
        *(pl.lit(4).alias(name) for name in ("count_1d", "count_7d", "count_30d", "count_all")),
        pl.Series("recency_s", [100, 200]),
    )
    asked = pl.DataFrame({"user_id": [1, 1, 2], "timestamp": [21, 9, 30]})
    nothing = [0, 0, 0, 0, -1]
    assert stored_statistics(features, asked, key="user_id").tolist() == [[4, 4, 4, 4, 200], nothing, nothing]


def test_stored_simtier_is_empty_for_a_candidate_that_is_not_there() -> None:
    gsu = pl.DataFrame({"request_id": [1], "item_id": [5], "n_valid": [3]}).with_columns(
        pl.Series("simtier", np.full((1, 22), 2, np.uint8)),
        pl.Series("simtier_recent", np.ones((1, 22), np.uint8)),
    )
    found = stored_simtier(gsu, pl.DataFrame({"request_id": [1, 1], "item_id": [6, 5]}))
    np.testing.assert_allclose(found[0], 0)
    np.testing.assert_allclose(found[1], np.log1p([2] * 22 + [1] * 22 + [3]), rtol=1e-6)


def test_codes_keep_the_order_of_the_ids() -> None:
    assert codes_of(pl.Series(["c", "x", "a"]), pl.Series(["a", "b", "c"])).tolist() == [2, -1, 0]
