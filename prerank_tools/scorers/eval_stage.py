"""`eval scores`: how well scores order and price the candidates, beside popularity and chance."""

# n candidates, R requests
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prerank_tools.errors import ContractError
from prerank_tools.features.statistics import ALL_TIME, PastCounts
from prerank_tools.metrics.bootstrap import Interval, mean_interval, user_interval
from prerank_tools.metrics.probability import (
    calibration,
    expected_calibration_error,
    log_loss,
    normalized_entropy,
)
from prerank_tools.metrics.ranking import (
    SortedScores,
    auc_per_group,
    grouped_auc,
    ndcg_per_group,
    recall_per_group,
)
from prerank_tools.scorers.item_frames import codes_of
from prerank_tools.scorers.request_frames import (
    FlatRequests,
    columns_of,
    first_time,
    flatten,
    labels_of,
    tasks_of,
)
from prerank_tools.tables.events import known_at
from prerank_tools.tables.table import Table, open_table


def evaluate_scores(
    scores: Path,
    requests: Path,
    *,
    events: Path | None = None,
    ks: Sequence[int] = (10, 50),
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of every task with 95 % intervals over resampled users, and those of trivial scorers.

    Candidates that were cut off (`--top`) share the last place, and AUC and NE are left out.
    Raises ContractError where the scores come from a model that has seen the requests' time.
    """
    scored, asked = open_table(scores, "scores"), open_table(requests, "requests")
    check_time(scored, asked)
    tasks = tasks_of(asked)
    if not tasks:
        raise ContractError(f"{requests}: no column `label_<task>`", "give requests with labels")
    flat = flatten(asked.read(columns_of(asked)), source=str(requests))
    joined = join_scores(flat, scored)
    unscored = int(joined["score"].null_count())
    if unscored == len(joined):
        raise ContractError(
            f"{scores}: no candidate of {requests} is scored", "give the requests that were scored"
        )
    rankings = {"scores": joined["score"].to_numpy()}
    if events is not None:
        rankings["popularity"] = popularity(flat, open_table(events, "events"))
    rankings["random"] = np.random.default_rng(seed).random(len(joined))
    rankings["scores"] = _fill_lowest(rankings["scores"])
    labels_nK = labels_of(flat, tasks)
    report: dict[str, Any] = {
        "requests": len(flat.requests),
        "candidates": len(joined),
        "users": flat.requests["user_id"].n_unique(),
        "unscored": unscored,
    }
    for column, task in enumerate(tasks):
        view = _View(flat, labels_nK[:, column], tuple(ks), resamples, seed)
        found: dict[str, Any] = {
            name: view.ranking(values, whole=name != "scores" or not unscored)
            for name, values in rankings.items()
        }
        if f"p_{task}" in joined.columns and not unscored:
            found["scores"] |= view.probability(joined[f"p_{task}"].to_numpy())
        report[task] = {
            "positives": int(view.label_n.sum()),
            "base_rate": float(view.label_n.mean()),
            **found,
        }
    return report


def check_time(scores: Table, requests: Table) -> None:
    """Refuse scores whose model or tables have seen events later than the first request."""
    start = first_time(requests)
    if scores.data_cutoff is not None and scores.data_cutoff > start:
        raise ContractError(
            f"{scores.path}: made with events up to {scores.data_cutoff}, the requests start at {start}",
            f"fit them with --until {start} and score again",
        )


def join_scores(flat: FlatRequests, scores: Table) -> pl.DataFrame:
    """Scores and probabilities row for row with the candidates; null where there is none."""
    columns = [n for n in scores.schema if n in ("request_id", "item_id", "score") or n.startswith("p_")]
    keys = flat.candidates.select("request_id", "item_id")
    frame = scores.read(columns)
    for key in ("request_id", "item_id"):
        if frame.schema[key] != keys.schema[key]:
            raise ContractError(
                f"{scores.path}: `{key}` is {frame.schema[key]}, in the requests it is {keys.schema[key]}",
                "give the requests that were scored",
            )
    return keys.join(frame, on=["request_id", "item_id"], how="left", maintain_order="left")


def popularity(flat: FlatRequests, events: Table) -> np.ndarray:
    """Events of each candidate known strictly before its request: what a scorer must beat."""
    late = ["ingested_at"] if "ingested_at" in events.schema else []
    frame = events.read(["item_id", "timestamp", *late]).drop_nulls(["item_id", "timestamp"])
    ids = frame["item_id"].unique().sort()
    past = PastCounts(
        codes_of(frame["item_id"], ids),
        frame["timestamp"].to_numpy(),
        known_at(frame).to_numpy(),
        windows=(ALL_TIME,),
    )
    time_n = flat.requests["timestamp"].to_numpy()[flat.request_n]
    return past.counts(codes_of(flat.candidates["item_id"], ids), time_n)[:, 0].astype(np.float64)


class _View:
    """The labelled candidates of one task, and what every ranking of them is measured by."""

    def __init__(
        self, flat: FlatRequests, label_n: np.ndarray, ks: Sequence[int], resamples: int, seed: int
    ) -> None:
        self.known_n = ~np.isnan(label_n)
        self.label_n = (label_n[self.known_n] > 0).astype(np.int8)
        self.request_n = flat.request_n[self.known_n]
        user_R = flat.requests["user_id"].rank("dense").to_numpy()
        self.user_n, self.ks = user_R[self.request_n], ks
        self.user_of_R = user_R[np.unique(self.request_n)]
        self.resamples, self.seed = resamples, seed

    def ranking(self, scores_n: np.ndarray, *, whole: bool) -> dict[str, Any]:
        """AUC, GAUC, UAUC (where every candidate is scored), recall@k and NDCG@k."""
        scores_n = scores_n[self.known_n]
        found: dict[str, Any] = {}
        if whole:
            sorted_scores = SortedScores(self.label_n, scores_n)
            found["auc"] = self._interval(user_interval(sorted_scores.auc, self.user_n, **self._draws()))
            found |= self._grouped(scores_n)
        for k in self.ks:
            for name, metric in (("recall", recall_per_group), ("ndcg", ndcg_per_group)):
                value_R = metric(self.label_n, scores_n, self.request_n, k)
                found[f"{name}@{k}"] = self._interval(mean_interval(value_R, self.user_of_R, **self._draws()))
        return found

    def _grouped(self, scores_n: np.ndarray) -> dict[str, Any]:
        auc_U, rows_U = auc_per_group(self.label_n, scores_n, self.user_n)
        users_U, both = np.unique(self.user_n), grouped_auc(self.label_n, scores_n, self.user_n)
        return {
            "gauc": self._interval(mean_interval(auc_U, users_U, weights_n=rows_U, **self._draws())),
            "uauc": self._interval(mean_interval(auc_U, users_U, **self._draws())),
            "one_class_users": both.dropped,
        }

    def probability(self, prob_n: np.ndarray) -> dict[str, Any]:
        """NE, log loss and calibration of predicted probabilities."""
        prob_n = prob_n[self.known_n]

        def ne(weights_n: np.ndarray) -> float:
            return normalized_entropy(self.label_n, prob_n, weights_n)

        return {
            "ne": self._interval(user_interval(ne, self.user_n, **self._draws())),
            "log_loss": log_loss(self.label_n, prob_n),
            "calibration": calibration(self.label_n, prob_n) if self.label_n.any() else None,
            "calibration_error": expected_calibration_error(self.label_n, prob_n),
        }

    def _draws(self) -> dict[str, Any]:
        return {"resamples": self.resamples, "seed": self.seed}

    def _interval(self, interval: Interval) -> Mapping[str, float | None]:
        # JSON has no NaN: a metric that is not defined here is null
        return {k: None if np.isnan(v) else v for k, v in asdict(interval).items()}


def _fill_lowest(scores_n: np.ndarray) -> np.ndarray:
    """Candidates without a score share the place after the last."""
    return np.where(np.isnan(scores_n), np.nanmin(scores_n) - 1, scores_n)
