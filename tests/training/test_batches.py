"""Shuffled rows: every row once an epoch, over any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prerank_tools.training.batches import ShuffledRows


def rows(number: int = 10, batch_size: int = 4, seed: int = 0) -> ShuffledRows:
    return ShuffledRows(number, lambda rows_B: rows_B, batch_size, seed)


def test_same_seed_and_epoch_give_the_same_batches() -> None:
    for one, other in zip(rows().epoch(3), rows().epoch(3), strict=True):
        assert np.array_equal(one, other)
    assert any(not np.array_equal(a, b) for a, b in zip(rows().epoch(0), rows().epoch(1), strict=True))


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 4))
def test_ranks_share_every_row_and_none_goes_without(number: int, batch_size: int, world: int) -> None:
    batches = rows(number, batch_size)
    ranks = [list(batches.epoch(0, rank=rank, world=world)) for rank in range(world)]
    assert all(len(rank) == len(batches) for rank in ranks)
    assert all(len(batch) > 0 for rank in ranks for batch in rank)
    seen = np.concatenate([batch for rank in ranks for batch in rank])
    assert set(seen) == set(range(number))
    if batch_size % world == 0 and (number % batch_size == 0 or number % batch_size >= world):
        assert len(seen) == number


@pytest.mark.parametrize(("number", "sizes"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3])])
def test_last_batch_is_ragged(number: int, sizes: list[int]) -> None:
    assert [len(batch) for batch in rows(number).epoch(0)] == sizes
