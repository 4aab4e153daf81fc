"""The duplicate-content floor: equal bytes are found, near ones are not."""

from __future__ import annotations

import numpy as np

from prerank_tools.quantizers.duplicates import content_groups, duplicate_floor, list_duplicates


def test_groups_floor_and_listing() -> None:
    x = np.array([[1, 2], [3, 4], [1, 2], [3, np.nextafter(np.float32(4), 5)], [1, 2], [3, 4]], np.float32)
    first = content_groups(x)
    assert first.tolist() == [0, 1, 0, 3, 0, 1]
    assert duplicate_floor(first) == 0.5
    assert [rows.tolist() for rows in list_duplicates(first)] == [[0, 2, 4], [1, 5]]
    assert [rows.tolist() for rows in list_duplicates(first, limit=1)] == [[0, 2, 4]]


def test_content_hashes_work_as_well_as_vectors() -> None:
    assert content_groups(np.array(["x", "y", "x"])).tolist() == [0, 1, 0]


def test_odd_widths_and_an_empty_table() -> None:
    x = np.array([[1, 2, 3], [1, 2, 4], [1, 2, 3]], dtype=np.int8)
    assert content_groups(x).tolist() == [0, 1, 0]
    assert duplicate_floor(content_groups(np.zeros((0, 4), np.float32))) == 0.0


def test_a_large_table_agrees_with_numpy_unique() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, size=(20_000, 8)).astype(np.float32)
    assert len(np.unique(content_groups(x))) == len(np.unique(x, axis=0))
