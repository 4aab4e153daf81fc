"""Ranking metrics over labelled, scored rows: AUC, GAUC, UAUC, recall@k, NDCG@k; ties count half, exactly."""

# n rows, G groups (users or requests)
from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GroupedAuc:
    """AUC inside each group, averaged two ways; one-class groups cannot be ranked and are only counted."""

    gauc: float  # weighted by the group's rows (impressions)
    uauc: float  # every group alike
    groups: int  # groups that have both classes
    dropped: int  # one-class groups


def auc(labels_n: np.ndarray, scores_n: np.ndarray, weights_n: np.ndarray | None = None) -> float:
    """Share of (positive, negative) pairs in the right order, ties count half; NaN with one class only."""
    labels_n, scores_n = _checked(labels_n, scores_n)
    return SortedScores(labels_n, scores_n).auc(weights_n)


class SortedScores:
    """Rows sorted by score once, so that the AUC under many row weightings costs a pass each."""

    def __init__(self, labels_n: np.ndarray, scores_n: np.ndarray) -> None:
        self.order_n = np.argsort(scores_n, kind="stable")
        self.positive_n = labels_n[self.order_n] > 0
        sorted_n = scores_n[self.order_n]
        self.tie_starts = (
            np.flatnonzero(np.r_[True, sorted_n[1:] != sorted_n[:-1]]) if len(sorted_n) else np.zeros(0, int)
        )

    def auc(self, weights_n: np.ndarray | None = None) -> float:
        """AUC with row i counted `weights_n[i]` times."""
        if not len(self.order_n):
            return float("nan")
        weights = (
            np.ones(len(self.order_n)) if weights_n is None else np.asarray(weights_n, float)[self.order_n]
        )
        positive_T = np.add.reduceat(np.where(self.positive_n, weights, 0.0), self.tie_starts)
        negative_T = np.add.reduceat(np.where(self.positive_n, 0.0, weights), self.tie_starts)
        below_T = np.cumsum(negative_T) - negative_T
        pairs = positive_T.sum() * negative_T.sum()
        return float(positive_T @ (below_T + 0.5 * negative_T) / pairs) if pairs > 0 else float("nan")


def grouped_auc(labels_n: np.ndarray, scores_n: np.ndarray, groups_n: np.ndarray) -> GroupedAuc:
    """GAUC (by impressions) and UAUC (unweighted) over `groups_n`, usually the users."""
    auc_G, rows_G = auc_per_group(labels_n, scores_n, groups_n)
    usable_G = ~np.isnan(auc_G)
    if not usable_G.any():
        return GroupedAuc(float("nan"), float("nan"), 0, len(auc_G))
    return GroupedAuc(
        gauc=float(np.average(auc_G[usable_G], weights=rows_G[usable_G])),
        uauc=float(auc_G[usable_G].mean()),
        groups=int(usable_G.sum()),
        dropped=int((~usable_G).sum()),
    )


def auc_per_group(
    labels_n: np.ndarray, scores_n: np.ndarray, groups_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """AUC and rows of every group, in the order of `np.unique(groups_n)`; NaN where a group has one class."""
    labels_n, scores_n = _checked(labels_n, scores_n)
    group_n = np.unique(groups_n, return_inverse=True)[1].reshape(-1)
    order_n = np.lexsort((scores_n, group_n))
    label_n, group_n = labels_n[order_n] > 0, group_n[order_n]
    tie_n, size_T = _ties(scores_n[order_n], group_n)
    end_T = np.cumsum(size_T)
    rank_n = ((2 * end_T - size_T + 1) / 2)[tie_n]  # the mean rank (from 1) of a tie, over all rows
    rows_G = np.bincount(group_n)
    first_G = np.cumsum(rows_G) - rows_G
    positives_G = np.bincount(group_n, weights=label_n)
    negatives_G = rows_G - positives_G
    ranks_G = np.bincount(group_n, weights=np.where(label_n, rank_n - first_G[group_n], 0.0))
    pairs_G = positives_G * negatives_G
    with np.errstate(invalid="ignore", divide="ignore"):
        auc_G = (ranks_G - positives_G * (positives_G + 1) / 2) / pairs_G
    return np.where(pairs_G > 0, auc_G, np.nan), rows_G


def recall_at_k(labels_n: np.ndarray, scores_n: np.ndarray, groups_n: np.ndarray, k: int) -> float:
    """Mean over requests that have positives of the share of them in the top k."""
    return mean_present(recall_per_group(labels_n, scores_n, groups_n, k))


def ndcg_at_k(labels_n: np.ndarray, scores_n: np.ndarray, groups_n: np.ndarray, k: int) -> float:
    """Mean NDCG@k with binary gains; requests without a positive are left out."""
    return mean_present(ndcg_per_group(labels_n, scores_n, groups_n, k))


def recall_per_group(labels_n: np.ndarray, scores_n: np.ndarray, groups_n: np.ndarray, k: int) -> np.ndarray:
    """Recall@k of every group in the order of `np.unique`; NaN without a positive. Ties share places."""
    place_weight = np.zeros(len(labels_n))
    place_weight[:k] = 1.0
    gain_G, positives_G = _expected_gain(labels_n, scores_n, groups_n, place_weight)
    with np.errstate(invalid="ignore"):
        return np.asarray(gain_G / np.where(positives_G > 0, positives_G, np.nan))


def ndcg_per_group(labels_n: np.ndarray, scores_n: np.ndarray, groups_n: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k of every group in the order of `np.unique`; NaN without a positive. Ties share places."""
    place_weight = np.zeros(len(labels_n))
    place_weight[:k] = 1.0 / np.log2(np.arange(min(k, len(labels_n))) + 2)
    gain_G, positives_G = _expected_gain(labels_n, scores_n, groups_n, place_weight)
    ideal_G = np.r_[0.0, np.cumsum(place_weight)][positives_G.astype(int)]
    with np.errstate(invalid="ignore"):
        return np.asarray(gain_G / np.where(ideal_G > 0, ideal_G, np.nan))


def mean_present(values_G: np.ndarray) -> float:
    """Mean over the groups that have a value (not NaN); NaN when none has."""
    present = values_G[~np.isnan(values_G)]
    return float(present.mean()) if len(present) else float("nan")


def _expected_gain(
    labels_n: np.ndarray, scores_n: np.ndarray, groups_n: np.ndarray, place_weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sum over positives of the weight of their place, in expectation over the orders of tied rows."""
    labels_n, scores_n = _checked(labels_n, scores_n)
    group_n = np.unique(groups_n, return_inverse=True)[1].reshape(-1)
    order_n = np.lexsort((-scores_n, group_n))
    label_n, group_n = labels_n[order_n] > 0, group_n[order_n]
    tie_n, size_T = _ties(scores_n[order_n], group_n)
    rows_G = np.bincount(group_n)
    start_T = np.cumsum(size_T) - size_T
    place_T = start_T - (np.cumsum(rows_G) - rows_G)[group_n[start_T]]
    sums = np.r_[0.0, np.cumsum(place_weight)]
    mean_T = (sums[place_T + size_T] - sums[place_T]) / size_T
    gain_G = np.bincount(group_n, weights=np.where(label_n, mean_T[tie_n], 0.0))
    return gain_G, np.bincount(group_n, weights=label_n)


def _ties(scores_n: np.ndarray, group_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows sorted by (group, score) -> the tie each row belongs to, and every tie's size."""
    new_n = np.r_[True, (scores_n[1:] != scores_n[:-1]) | (group_n[1:] != group_n[:-1])][: len(scores_n)]
    tie_n = np.cumsum(new_n) - 1
    return tie_n, np.bincount(tie_n, minlength=0)


def _checked(labels_n: np.ndarray, scores_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels_n, scores_n = np.asarray(labels_n), np.asarray(scores_n)
    if labels_n.shape != scores_n.shape:
        raise ValueError(f"labels {labels_n.shape} and scores {scores_n.shape} differ in shape")
    if np.isnan(scores_n).any():
        raise ValueError("scores hold NaN: they cannot be ordered")
    return labels_n, scores_n
