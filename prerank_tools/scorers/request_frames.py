"""Requests in either form as two frames: one row a request, one row a candidate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from prerank_tools.errors import ContractError
from prerank_tools.tables.table import Table

LABEL = "label_"


@dataclass(frozen=True)
class FlatRequests:
    """Requests sorted by id; `candidates` by (request, item), so tied scores fall to the smaller id."""

    requests: pl.DataFrame  # request_id, user_id, timestamp
    candidates: pl.DataFrame  # request_id, item_id, label_*
    offset_R: np.ndarray  # candidates of request r are rows offset_R[r] .. offset_R[r + 1]

    @property
    def request_n(self) -> np.ndarray:
        """Which request each candidate belongs to."""
        return np.repeat(np.arange(len(self.requests)), np.diff(self.offset_R))


def flatten(frame: pl.DataFrame, *, source: str = "requests") -> FlatRequests:
    """One row a candidate, whichever form the requests have; ContractError where a candidate comes twice."""
    flat = _one_row_a_candidate(frame, source).drop_nulls(["request_id", "user_id", "timestamp", "item_id"])
    flat = flat.sort("request_id", "item_id")
    repeated = flat.select("request_id", "item_id").is_duplicated()
    if repeated.any():
        row = flat.row(int(repeated.arg_true()[0]), named=True)
        raise ContractError(
            f"{source}: request {row['request_id']!r} has candidate {row['item_id']!r} more than once",
            "keep each candidate once a request",
        )
    grouped = flat.group_by("request_id", maintain_order=True).agg(
        pl.col("user_id", "timestamp").first(), pl.len()
    )
    return FlatRequests(
        requests=grouped.select("request_id", "user_id", "timestamp"),
        candidates=flat.select("request_id", "item_id", *_labels(flat)),
        offset_R=np.r_[0, np.cumsum(grouped["len"].to_numpy().astype(np.int64))].astype(np.int64),
    )


def tasks_of(requests: Table) -> tuple[str, ...]:
    """What the requests are labelled with: `label_click` is the task `click`."""
    return tuple(sorted(n.removeprefix(LABEL) for n in requests.schema if n.startswith(LABEL)))


def columns_of(requests: Table) -> list[str]:
    """The columns a scorer needs."""
    item = "candidates" if "candidates" in requests.schema else "item_id"
    return ["request_id", "user_id", "timestamp", item, *(f"{LABEL}{task}" for task in tasks_of(requests))]


def first_time(requests: Table) -> int:
    """Time of the earliest request."""
    return int(requests.scan(["timestamp"]).select(pl.col("timestamp").min()).collect().item() or 0)


def labels_of(flat: FlatRequests, tasks: tuple[str, ...]) -> np.ndarray:
    """Labels float32 [n, K]; NaN where there is none."""
    columns = [
        flat.candidates[f"{LABEL}{task}"].cast(pl.Float32).fill_null(float("nan")).to_numpy()
        if f"{LABEL}{task}" in flat.candidates.columns
        else np.full(len(flat.candidates), np.nan, dtype=np.float32)
        for task in tasks
    ]
    return np.stack(columns, axis=1) if columns else np.zeros((len(flat.candidates), 0), np.float32)


def _one_row_a_candidate(frame: pl.DataFrame, source: str) -> pl.DataFrame:
    if "candidates" not in frame.columns:
        return frame
    lists = [name for name in _labels(frame) if isinstance(frame.schema[name], (pl.List, pl.Array))]
    for name in lists:
        uneven = pl.col(name).list.len().fill_null(0) != pl.col("candidates").list.len().fill_null(0)
        wrong = frame.cast({name: pl.List(frame.schema[name].inner)}).filter(uneven)  # type: ignore[attr-defined]
        if len(wrong):
            raise ContractError(
                f"{source}: `{name}` of request {wrong['request_id'][0]!r} is not as long as its candidates",
                "give one label a candidate, null where it is not known",
            )
    whole = frame.filter(pl.col("candidates").list.len() > 0)
    return whole.explode(["candidates", *lists]).rename({"candidates": "item_id"})


def _labels(frame: pl.DataFrame) -> list[str]:
    return [name for name in frame.columns if name.startswith(LABEL)]
