"""Intervals by resampling users: rows of one user stand or fall together, so row resampling would flatter."""

# n rows, U users
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A value on all users and its percentile interval over resampled users."""

    value: float
    low: float
    high: float


def user_interval(
    statistic: Callable[[np.ndarray], float],
    users_n: np.ndarray,
    *,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of `statistic(weights_n)` with whole users drawn with replacement.

    `weights_n` says how often each row counts; all ones for the value itself. Resamples on which the
    statistic is undefined (NaN) are left out.
    """
    user_n = np.unique(users_n, return_inverse=True)[1].reshape(-1)
    users = int(user_n.max()) + 1 if len(user_n) else 0
    rng = np.random.default_rng(seed)
    draws = (
        np.bincount(rng.integers(0, users, users), minlength=users) for _ in range(resamples if users else 0)
    )
    values = np.array([statistic(drawn_U[user_n].astype(np.float64)) for drawn_U in draws])
    low, high = _percentiles(values, level)
    return Interval(float(statistic(np.ones(len(user_n)))), low, high)


def mean_interval(
    values_n: np.ndarray,
    users_n: np.ndarray,
    *,
    weights_n: np.ndarray | None = None,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """User interval of the (weighted) mean of per-group values such as a request's recall, NaN left out."""
    present = ~np.isnan(values_n)
    values, users = values_n[present], np.asarray(users_n)[present]
    weights = np.ones(len(values)) if weights_n is None else np.asarray(weights_n, float)[present]

    def mean(times: np.ndarray) -> float:
        total = float((times * weights).sum())
        return float((times * weights) @ values / total) if total > 0 else float("nan")

    return user_interval(mean, users, resamples=resamples, level=level, seed=seed)


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
