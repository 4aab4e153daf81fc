"""Ranking metrics: golden values, scikit-learn oracles, ties, one-class groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from prerank_tools.metrics.ranking import (
    auc,
    auc_per_group,
    grouped_auc,
    ndcg_at_k,
    recall_at_k,
    recall_per_group,
)


def test_auc_counts_ties_half() -> None:
    assert auc(np.array([1, 0, 1, 0]), np.array([0.9, 0.9, 0.5, 0.1])) == 0.625  # (1/2 + 1 + 0 + 1) / 4
    assert auc(np.array([1, 0]), np.array([0.3, 0.3])) == 0.5


def test_auc_of_one_class_or_nothing_is_nan() -> None:
    assert math.isnan(auc(np.array([1, 1]), np.array([0.1, 0.2])))
    assert math.isnan(auc(np.array([]), np.array([])))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(1, 8))
def test_auc_equals_scikit_learn(seed: int, rows: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    labels, scores = rng.integers(0, 2, rows), rng.integers(0, levels, rows) / levels
    labels[:2] = [0, 1]
    weights = rng.integers(0, 4, rows).astype(float)
    weights[:2] = 1
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert auc(labels, scores, weights) == pytest.approx(
        roc_auc_score(labels, scores, sample_weight=weights), abs=1e-12
    )


def test_gauc_weighs_impressions_and_uauc_does_not() -> None:
    users = np.array(["a", "a", "b", "b", "b", "c", "c"])
    labels = np.array([1, 0, 1, 0, 0, 1, 1])
    scores = np.array([0.9, 0.1, 0.5, 0.7, 0.2, 0.3, 0.4])
    result = grouped_auc(labels, scores, users)  # a: 1.0 over 2 rows, b: 0.5 over 3 rows, c: one class
    assert result.gauc == pytest.approx((1.0 * 2 + 0.5 * 3) / 5)
    assert result.uauc == pytest.approx(0.75)
    assert (result.groups, result.dropped) == (2, 1)


def test_grouped_auc_without_a_usable_group() -> None:
    result = grouped_auc(np.array([1, 0]), np.array([0.1, 0.2]), np.array([1, 2]))
    assert math.isnan(result.gauc)
    assert (result.groups, result.dropped) == (0, 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_auc_per_group_equals_one_group_at_a_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups, labels = rng.integers(0, 6, 50), rng.integers(0, 2, 50)
    scores = rng.integers(0, 5, 50) / 5
    auc_G, rows_G = auc_per_group(labels, scores, groups)
    alone = [auc(labels[groups == g], scores[groups == g]) for g in np.unique(groups)]
    np.testing.assert_allclose(auc_G, alone, atol=1e-12)
    assert rows_G.sum() == 50


def test_recall_at_k_golden() -> None:
    groups = np.array([1, 1, 1, 2, 2, 2, 3, 3])
    labels = np.array([1, 0, 1, 0, 1, 0, 0, 0])
    scores = np.array([3.0, 2.0, 1.0, 3.0, 2.0, 1.0, 1.0, 2.0])
    assert recall_at_k(labels, scores, groups, 1) == pytest.approx(
        (0.5 + 0.0) / 2
    )  # request 3 has no positive
    assert recall_at_k(labels, scores, groups, 2) == pytest.approx((0.5 + 1.0) / 2)
    assert recall_at_k(labels, scores, groups, 9) == 1.0


def test_tied_scores_share_places_whatever_the_row_order() -> None:
    labels = np.array([1, 0, 0, 0])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        assert recall_per_group(labels[order], np.zeros(4), np.zeros(4), 1).tolist() == [0.25]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.booleans())
def test_ndcg_equals_scikit_learn(seed: int, k: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 10)
    labels[0] = 1
    scores = rng.integers(0, 4, 10).astype(float) if ties else rng.permutation(10).astype(float)
    expected = ndcg_score(labels[None], scores[None], k=k)  # scikit-learn averages over ties too
    assert ndcg_at_k(labels, scores, np.zeros(10), k) == pytest.approx(expected, abs=1e-12)


def test_no_request_with_a_positive_is_nan() -> None:
    assert math.isnan(ndcg_at_k(np.zeros(3), np.arange(3.0), np.zeros(3), 2))


def test_nan_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        auc(np.array([0, 1]), np.array([0.1, np.nan]))
