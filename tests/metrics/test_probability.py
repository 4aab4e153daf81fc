"""NE, log loss, calibration and the recovery of down-sampled probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics

from prerank_tools.metrics.probability import (
    calibration,
    expected_calibration_error,
    log_loss,
    normalized_entropy,
    recover_downsampled,
)

LABELS, PROBS = np.array([1, 0, 0, 1]), np.array([0.8, 0.2, 0.4, 0.6])


def test_ne_golden() -> None:
    assert log_loss(LABELS, PROBS) == pytest.approx(0.3669846, abs=1e-7)
    assert normalized_entropy(LABELS, PROBS) == pytest.approx(0.5294468, abs=1e-7)


@pytest.mark.parametrize("positives", [1, 7, 50, 99])
def test_a_constant_at_the_base_rate_has_ne_of_one(positives: int) -> None:
    labels = np.arange(100) < positives
    assert normalized_entropy(labels, np.full(100, positives / 100)) == pytest.approx(1.0, abs=1e-12)


def test_ne_of_one_class_is_nan() -> None:
    assert math.isnan(normalized_entropy(np.ones(3), np.full(3, 0.9)))


def test_log_loss_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, probs, weights = rng.integers(0, 2, 200), rng.uniform(0.01, 0.99, 200), rng.integers(1, 4, 200)
    assert log_loss(labels, probs) == pytest.approx(sklearn.metrics.log_loss(labels, probs), abs=1e-12)
    expected = sklearn.metrics.log_loss(labels, probs, sample_weight=weights)
    assert log_loss(labels, probs, weights) == pytest.approx(expected, abs=1e-12)


def test_certain_and_wrong_is_finite() -> None:
    assert log_loss(np.array([1]), np.array([0.0])) == pytest.approx(-math.log(1e-12))


def test_calibration() -> None:
    assert calibration(LABELS, PROBS) == pytest.approx(1.0)
    assert calibration(np.array([1, 0]), np.array([0.5, 1.0])) == pytest.approx(1.5)
    assert math.isnan(calibration(np.zeros(2), np.ones(2)))


def test_expected_calibration_error() -> None:
    labels, probs = np.array([0, 0, 1, 1]), np.array([0.1, 0.1, 0.7, 0.7])
    assert expected_calibration_error(labels, probs, bins=2) == pytest.approx((0.1 + 0.3) / 2)


def test_recovery_golden() -> None:
    recovered = recover_downsampled(np.array([0.5]), 0.1), recover_downsampled(np.array([0.9]), 0.2)
    assert np.concatenate(recovered) == pytest.approx([0.0909091, 0.6428571], abs=1e-7)


def test_recovery_inverts_down_sampling() -> None:
    true = np.linspace(0.01, 0.99, 9)
    sampled = true / (true + 0.25 * (1 - true))  # odds rise by 1 / rate
    np.testing.assert_allclose(recover_downsampled(sampled, 0.25), true, atol=1e-12)
    with pytest.raises(ValueError, match="rate"):
        recover_downsampled(true, 0.0)
