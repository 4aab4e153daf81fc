"""The linear probe: it finds what is linear, judges on others, and its closed form is the regression."""

from __future__ import annotations

import numpy as np

from prerank_tools.users import probe


def test_fit_is_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 3)), rng.standard_normal((50, 2))
    predict = probe.fit(x, y, ridge=0.5)
    z = (x - x.mean(0)) / x.std(0)
    rows = np.r_[z, np.sqrt(0.5 * 50) * np.eye(3)]  # ridge as extra rows of an ordinary regression
    weight, *_ = np.linalg.lstsq(rows, np.r_[y - y.mean(0), np.zeros((3, 2))], rcond=None)
    np.testing.assert_allclose(predict(x), z @ weight + y.mean(0), atol=1e-10)


def test_linear_signal_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(1)
    item_IE = rng.standard_normal((200, 8))
    bought = [np.array([item]) for item in rng.integers(0, 200, 300)]
    told = item_IE[np.concatenate(bought)] @ rng.standard_normal((8, 12))
    assert probe.crossfit_hits(told, item_IE, bought, ridge=0.01).mean() > 0.95
    noise = rng.standard_normal((300, 12))
    assert probe.crossfit_hits(noise, item_IE, bought).mean() < 0.15


def test_a_sample_does_not_teach_its_own_fold() -> None:
    rng = np.random.default_rng(2)
    item_IE, x_SD = rng.standard_normal((30, 4)), np.eye(20)  # each sample has a dimension of its own
    bought = [np.array([item]) for item in rng.integers(0, 30, 20)]
    alone = probe.crossfit_hits(x_SD, item_IE, bought, ridge=1e-6, folds=20, k=3)
    assert alone.mean() < 0.5


def test_hits_by_hand() -> None:
    score = np.array([[0.1, 0.9, 0.9, 0.0], [0.5, 0.4, 0.3, 0.2]])
    assert probe.hits(score, [np.array([2]), np.array([1, 3])], k=1).tolist() == [False, False]
    assert probe.hits(score, [np.array([2]), np.array([1, 3])], k=2).tolist() == [True, True]
