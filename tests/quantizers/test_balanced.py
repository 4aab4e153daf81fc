"""Balanced RQ-KMeans: even use that holds for new items, at a small price in error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prerank_tools.quantizers.assign import assign_exact
from prerank_tools.quantizers.balanced import BalancedRKMeans
from prerank_tools.quantizers.codebook import quantizer_of
from prerank_tools.quantizers.rkmeans import RKMeans


def skewed(rows: int, seed: int) -> np.ndarray:
    """One cluster holds half of the items."""
    rng = np.random.default_rng(seed)
    centre_CD = np.random.default_rng(0).standard_normal((40, 16))
    share_C = np.r_[0.5, np.full(39, 0.5 / 39)]
    which_N = rng.choice(40, rows, p=share_C)
    return (centre_CD[which_N] + 0.3 * rng.standard_normal((rows, 16))).astype(np.float32)


def fullest(codes_N: np.ndarray, size: int) -> float:
    """Share of the fullest code over the even share."""
    return float(np.bincount(codes_N, minlength=size).max() * size / len(codes_N))


@pytest.mark.parametrize("init", ["random", "progressive"])
@pytest.mark.parametrize("seed", range(4))
def test_balance_holds_for_items_it_was_not_fitted_on(seed: int, init: Any) -> None:
    fit_ND, new_ND = skewed(4_000, 10 + seed), skewed(4_000, 50 + seed)
    plain = RKMeans(sizes=(16,), iterations=10, init=init).fit(fit_ND, seed=seed)
    even = BalancedRKMeans(sizes=(16,), iterations=10, balance="all", init=init).fit(fit_ND, seed=seed)
    assert fullest(even.encode(fit_ND)[:, 0], 16) < 1.1
    assert fullest(even.encode(new_ND)[:, 0], 16) < 1.3 < fullest(plain.encode(new_ND)[:, 0], 16)


def test_last_balances_the_last_level_and_leaves_the_first_as_it_was() -> None:
    x_ND = skewed(3_000, 1)
    plain = RKMeans(sizes=(16, 16), iterations=8).fit(x_ND, seed=3)
    last = BalancedRKMeans(sizes=(16, 16), iterations=8).fit(x_ND, seed=3)
    np.testing.assert_array_equal(last.encode(x_ND)[:, 0], plain.encode(x_ND)[:, 0])
    even, uneven = (fullest(q.encode(x_ND)[:, 1], 16) for q in (last, plain))
    assert even < 1.3 < uneven
    error = [float(((x_ND - q.decode(q.encode(x_ND))) ** 2).sum()) for q in (last, plain)]
    assert error[0] < 1.5 * error[1]


@pytest.mark.parametrize("balance", ["last", "all"])
def test_prices_are_coordinates(balance: str) -> None:
    x_ND = skewed(1_000, 1)
    fitted = BalancedRKMeans(sizes=(8, 8, 8), iterations=4, balance=balance).fit(x_ND)
    padded_ND = np.pad(x_ND, ((0, 0), (0, 3)))
    np.testing.assert_array_equal(fitted.encode(x_ND), assign_exact(padded_ND, fitted.codebooks))
    assert fitted.decode(fitted.encode(x_ND)).shape == x_ND.shape
    priced = [bool(fitted.codebooks[level][:, 16 + level].any()) for level in range(3)]
    assert priced == ([True] * 3 if balance == "all" else [False, False, True])
    again = quantizer_of(fitted.to_codebook())
    np.testing.assert_array_equal(again.encode(x_ND), fitted.encode(x_ND))
    np.testing.assert_array_equal(again.decode(fitted.encode(x_ND)), fitted.decode(fitted.encode(x_ND)))
