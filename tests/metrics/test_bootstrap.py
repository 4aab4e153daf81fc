"""User bootstrap: whole users are drawn, the seed repeats, the interval covers."""

from __future__ import annotations

import numpy as np
import pytest

from prerank_tools.metrics.bootstrap import mean_interval, user_interval


def test_one_user_has_no_spread() -> None:
    interval = mean_interval(np.array([0.0, 1.0]), np.array(["u", "u"]))
    assert (interval.value, interval.low, interval.high) == (0.5, 0.5, 0.5)


def test_rows_of_a_user_are_drawn_together() -> None:
    users = np.repeat(np.arange(5), 3)
    seen: list[np.ndarray] = []
    user_interval(lambda w: float(seen.append(w) or 0.0), users, resamples=20)
    assert all((w.reshape(5, 3) == w.reshape(5, 3)[:, :1]).all() and w.sum() == 15 for w in seen)


def test_repeated_rows_of_few_users_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(0).normal(size=30)
    alone = mean_interval(values, np.arange(30), seed=1)
    repeated = mean_interval(np.repeat(values, 100), np.repeat(np.arange(30), 100), seed=1)
    assert repeated.low == pytest.approx(alone.low) and repeated.high == pytest.approx(alone.high)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        interval = mean_interval(rng.normal(size=60), np.arange(60), resamples=150, seed=trial)
        hits += interval.low <= 0 <= interval.high
    assert 85 <= hits <= 99


def test_missing_values_are_left_out_and_the_seed_repeats() -> None:
    values, users = np.array([1.0, np.nan, 3.0]), np.array([1, 2, 3])
    assert mean_interval(values, users, seed=3) == mean_interval(values, users, seed=3)
    assert mean_interval(values, users).value == 2.0
