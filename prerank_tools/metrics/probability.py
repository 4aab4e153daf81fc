"""Metrics of predicted probabilities: log loss, normalised entropy (NE) and calibration."""

# n rows
from __future__ import annotations

import numpy as np

TINY = 1e-12  # a predicted 0 or 1 costs -log(TINY), not infinity


def normalized_entropy(
    labels_n: np.ndarray, probs_n: np.ndarray, weights_n: np.ndarray | None = None
) -> float:
    """Log loss over the entropy of the evaluation set's own base rate: a constant predictor at it gives 1.0.

    NaN when the labels have one class only: the base entropy is then zero.
    """
    weights = _weights(labels_n, weights_n)
    rate = float(weights @ (np.asarray(labels_n) > 0) / weights.sum())
    if rate in (0.0, 1.0):
        return float("nan")
    base = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    return float(log_loss(labels_n, probs_n, weights_n) / base)


def log_loss(labels_n: np.ndarray, probs_n: np.ndarray, weights_n: np.ndarray | None = None) -> float:
    """Mean binary cross-entropy in nats."""
    weights = _weights(labels_n, weights_n)
    return float(weights @ row_log_loss(labels_n, probs_n) / weights.sum())


def row_log_loss(labels_n: np.ndarray, probs_n: np.ndarray) -> np.ndarray:
    """Binary cross-entropy of every row, in nats."""
    probs_n = np.clip(np.asarray(probs_n, dtype=np.float64), TINY, 1 - TINY)
    return np.asarray(-np.where(np.asarray(labels_n) > 0, np.log(probs_n), np.log1p(-probs_n)))


def calibration(labels_n: np.ndarray, probs_n: np.ndarray) -> float:
    """Predicted positives over observed ones: above 1.0 it predicts too much; NaN without positives."""
    observed = float((np.asarray(labels_n) > 0).sum())
    return float(np.sum(probs_n, dtype=np.float64) / observed) if observed else float("nan")


def expected_calibration_error(labels_n: np.ndarray, probs_n: np.ndarray, *, bins: int = 10) -> float:
    """Mean |predicted - observed rate| over equally filled bins of the prediction."""
    order = np.argsort(probs_n, kind="stable")
    labels = (np.asarray(labels_n)[order] > 0).astype(np.float64)
    probs = np.asarray(probs_n, dtype=np.float64)[order]
    gaps = [
        abs(p.mean() - y.mean()) * len(p)
        for p, y in zip(np.array_split(probs, bins), np.array_split(labels, bins), strict=True)
        if len(p)
    ]
    return float(sum(gaps) / len(probs)) if len(probs) else float("nan")


def recover_downsampled(probs_n: np.ndarray, rate: float) -> np.ndarray:
    """Undo negative down-sampling to `rate`: `p = rate * q / ((1 - q) + rate * q)`.

    Golden: (0.5, 0.1) -> 0.0909091, (0.9, 0.2) -> 0.6428571.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"a down-sampling rate lies in (0, 1], not {rate}")
    probs_n = np.asarray(probs_n)
    return np.asarray(rate * probs_n / ((1 - probs_n) + rate * probs_n))


def _weights(labels_n: np.ndarray, weights_n: np.ndarray | None) -> np.ndarray:
    return np.ones(len(labels_n)) if weights_n is None else np.asarray(weights_n, dtype=np.float64)
