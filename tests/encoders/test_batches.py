"""Batches: every text once, within the budget, in shapes that exact batches fix."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prerank_tools.encoders.batches import Batch, Shape, Tokens, ahead, cut_batches, fill_batch

LENGTHS = st.lists(st.integers(1, 60), max_size=80).map(np.array)


@given(LENGTHS, st.integers(64, 512), st.sampled_from(["sorted", "uniform", "exact"]))
def test_every_text_comes_once_within_the_budget(lengths: np.ndarray, budget: int, shape: Shape) -> None:
    batches, exact = cut_batches(lengths.astype(int), budget=budget, shape=shape), shape == "exact"
    assert sorted(np.concatenate([b.rows for b in batches] or [[]]).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert batch.length >= lengths[batch.rows].max()
        assert batch.length * (batch.height - exact) <= max(budget, batch.length, 1024 * exact)


@given(LENGTHS, st.integers(64, 2048))
def test_an_exact_shape_depends_on_the_length_alone(lengths: np.ndarray, budget: int) -> None:
    for batch in cut_batches(lengths.astype(int), budget=budget, shape="exact"):
        assert batch.length % 8 == 0
        assert set(-(-lengths[batch.rows] // 8) * 8) == {batch.length}
        assert batch.height == max(budget, 1024) // batch.length + 1 > len(batch.rows)


def test_batches_are_sorted_by_length_so_that_little_is_padding() -> None:
    batches = cut_batches(np.array([2, 9, 3, 8]), budget=20)
    assert [(b.rows.tolist(), b.length) for b in batches] == [([1, 3], 9), ([2, 0], 3)]


def test_one_trained_length_pads_everything_to_it() -> None:
    batches = cut_batches(np.array([2, 9, 3]), budget=32, length=16)
    assert [(len(b.rows), b.length) for b in batches] == [(2, 16), (1, 16)]


def test_uniform_batches_hold_no_padding() -> None:
    batches = cut_batches(np.array([3, 5, 3, 5, 5]), budget=10, shape="uniform")
    assert [(b.rows.tolist(), b.length) for b in batches] == [([1, 3], 5), ([4], 5), ([0, 2], 3)]


def test_padding_and_the_dummy_row() -> None:
    tokens = Tokens.of([[5, 6], [7], []])
    ids, mask = fill_batch(tokens, Batch(np.array([1, 0, 2]), length=3, height=4), pad_id=9)
    assert ids.tolist() == [[7, 9, 9], [5, 6, 9], [9, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]


def test_ahead_keeps_the_order_and_works_in_a_thread() -> None:
    seen = list(ahead([1, 2, 3, 4], lambda n: (n * n, threading.current_thread() is threading.main_thread())))
    assert seen == [(n, (n * n, False)) for n in (1, 2, 3, 4)]


def test_ahead_hands_on_what_preparing_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        list(ahead([1, 0], lambda n: 1 // n))
