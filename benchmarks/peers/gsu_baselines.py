"""What one would write for GSU without this project: faiss, argpartition, bmm + topk; polars and numpy.

Inputs are unit float32 already, which none of them is charged for. None settles ties or near ties.
"""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import polars as pl
import torch


def faiss_knn(history_UND: np.ndarray, candidates_UCD: np.ndarray, k: int) -> np.ndarray:
    """`faiss.knn` called for each user; positions (U, C, K)."""
    found = [
        faiss.knn(candidates, history, k, metric=faiss.METRIC_INNER_PRODUCT)[1]
        for history, candidates in zip(history_UND, candidates_UCD, strict=True)
    ]
    return np.stack(found)


def argpartition(history_UND: np.ndarray, candidates_UCD: np.ndarray, k: int) -> np.ndarray:
    """A matrix product a user, argpartition, and a sort of the K."""
    found = []
    for history, candidates in zip(history_UND, candidates_UCD, strict=True):
        sims = candidates @ history.T
        top = np.argpartition(-sims, k, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(sims, top, axis=1), axis=1)
        found.append(np.take_along_axis(top, order, axis=1))
    return np.stack(found)


def bmm_topk(history_UND: np.ndarray, candidates_UCD: np.ndarray, k: int, dtype: torch.dtype) -> np.ndarray:
    """`torch.bmm` in blocks of 10 users (that stay in cache) and `topk`; bf16 converts inside."""
    found = []
    for start in range(0, len(history_UND), 10):
        history = torch.from_numpy(history_UND[start : start + 10]).to(dtype)
        candidates = torch.from_numpy(candidates_UCD[start : start + 10]).to(dtype)
        found.append(torch.bmm(candidates, history.transpose(1, 2)).topk(k, dim=-1).indices.numpy())
    return np.concatenate(found)


def polars_numpy(events: Path, requests: Path, embeddings: Path, out: Path, *, k: int = 50) -> None:
    """Parquet to Parquet as a careful script: one sort, rows by searchsorted, one product a request.

    Writes what `gsu topk` writes: ids, positions and cosines of the K best, two SimTier histograms.
    """
    vectors = pl.read_parquet(embeddings)
    width = vectors["embedding"].dtype.size  # type: ignore[attr-defined]
    table = vectors["embedding"].explode().to_numpy().reshape(-1, width).astype(np.float32)
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    rows = vectors.select("item_id").with_row_index("row")
    log = pl.read_parquet(events).join(rows, on="item_id").sort("user_id", "timestamp")
    user, time = log["user_id"].to_numpy(), log["timestamp"].to_numpy()
    item, names = log["row"].to_numpy(), vectors["item_id"]
    asked = pl.read_parquet(requests).sort("request_id")
    flat = asked.select("request_id", "candidates").explode("candidates").rename({"candidates": "item_id"})
    flat = flat.join(rows, on="item_id", maintain_order="left")
    starts = flat["request_id"].rle_id().to_numpy()
    bounds = np.searchsorted(starts, np.arange(len(asked) + 1))
    candidate_rows = flat["row"].to_numpy()
    lists, tiers, recents, counts = [], [], [], []
    for number, (who, when) in enumerate(zip(asked["user_id"], asked["timestamp"], strict=True)):
        first, last = np.searchsorted(user, who), np.searchsorted(user, who, side="right")
        last = first + np.searchsorted(time[first:last], when)
        past = item[first:last]
        sims = table[candidate_rows[bounds[number] : bounds[number + 1]]] @ table[past].T
        kept = min(k, len(past))
        if kept < len(past):
            top = np.argpartition(-sims, kept, axis=1)[:, :kept]
        else:
            top = np.broadcast_to(np.arange(kept), sims.shape)
        best = np.take_along_axis(sims, top, axis=1)
        order = np.argsort(-best, axis=1)
        top, best = np.take_along_axis(top, order, axis=1), np.take_along_axis(best, order, axis=1)
        lists.append((names.gather(past[top].ravel()), top.ravel().astype(np.uint32), best.ravel()))
        counts += [kept] * len(best)
        tiers.append(_histogram(best))
        recents.append(_histogram(sims[:, -50:]))
    ids = pl.concat([part[0] for part in lists])
    row = np.repeat(np.arange(len(counts)), counts)
    columns = pl.DataFrame(
        {
            "row": row,
            "behavior_ids": ids,
            "positions": np.concatenate([part[1] for part in lists]),
            "sims": np.concatenate([part[2] for part in lists]).astype(np.float16),
        }
    )
    packed = columns.group_by("row", maintain_order=True).agg("behavior_ids", "positions", "sims")
    frame = (
        flat.select("request_id", "item_id")
        .with_row_index("row")
        .with_columns(
            pl.col("row").cast(pl.Int64),
            pl.Series("simtier", np.concatenate(tiers)),
            pl.Series("simtier_recent", np.concatenate(recents)),
        )
    )
    frame.join(packed, on="row", how="left").drop("row").sort("request_id", "item_id").write_parquet(out)


def _histogram(sims: np.ndarray) -> np.ndarray:
    tier = np.ceil(sims * np.float32(10)).astype(np.int64) + 10
    cell = tier + np.arange(len(sims))[:, None] * 22
    return np.bincount(cell.ravel(), minlength=len(sims) * 22).reshape(len(sims), 22).astype(np.uint8)
