"""Do SIDs keep the neighbourhoods? Recall of the raw nearest neighbours among the reconstructed ones."""

# Q queries, N items, D dims, T true neighbours (10), M distinct SIDs, B rows of a block
from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

QUERIES = 1_024  # queries scored at once: 1,024 x 65,536 float32 is 256 MB


def nearest_rows(
    query_QD: np.ndarray, blocks: Iterable[np.ndarray], *, k: int, skip_Q: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Exact top-k by squared L2 over streamed blocks: distances (Q, k) and row numbers (Q, k), nearest first.

    `skip_Q` is each query's own row number, left out. Fewer than k rows in all give row -1 at distance inf.
    """
    best_QK = torch.full((len(query_QD), k), torch.inf)
    row_QK = torch.full((len(query_QD), k), -1, dtype=torch.int64)
    start = 0
    for block_BD in blocks:
        x_BD = torch.from_numpy(np.ascontiguousarray(block_BD, dtype=np.float32))
        norm_B = (x_BD**2).sum(dim=1)
        for at in range(0, len(query_QD), QUERIES):
            q_QD = torch.from_numpy(np.ascontiguousarray(query_QD[at : at + QUERIES], dtype=np.float32))
            d_QB = torch.addmm(norm_B, q_QD, x_BD.T, alpha=-2)
            if skip_Q is not None:
                _hide(d_QB, skip_Q[at : at + QUERIES] - start)
            near, index = d_QB.topk(min(k, len(x_BD)), dim=1, largest=False)
            merged, pick = torch.cat([best_QK[at : at + QUERIES], near], dim=1).topk(k, dim=1, largest=False)
            rows = torch.cat([row_QK[at : at + QUERIES], index + start], dim=1)
            best_QK[at : at + QUERIES] = merged
            row_QK[at : at + QUERIES] = rows.gather(1, pick)
        start += len(x_BD)
    row_QK[best_QK.isinf()] = -1
    norm_Q = (query_QD.astype(np.float32) ** 2).sum(axis=1, keepdims=True)
    return best_QK.numpy() + norm_Q, row_QK.numpy()


def neighbour_recall(
    truth_key_QT: np.ndarray,
    query_QD: np.ndarray,
    query_key_Q: np.ndarray,
    *,
    key_M: np.ndarray,
    count_M: np.ndarray,
    blocks: Iterable[np.ndarray],
) -> np.ndarray:
    """Recall@T of each query (Q,): the share of its raw neighbours among its T nearest by decoded vectors.

    `truth_key_QT` holds the SIDs of the raw neighbours, `blocks` the decoded vector of every distinct SID
    `key_M`. Items of one SID are at one distance, so where only some of them fit among the T nearest each
    counts with the chance that it is drawn: no order of rows can flatter a quantizer that collides.
    """
    wanted = truth_key_QT.shape[1]
    # One more: the query's own SID may hold nobody else.
    _, sid_QS = nearest_rows(query_QD, blocks, k=min(wanted + 1, len(key_M)))
    size_QS = count_M[sid_QS] - (key_M[sid_QS] == query_key_Q[:, None])
    before_QS = np.cumsum(size_QS, axis=1) - size_QS
    chance_QS = np.clip((wanted - before_QS) / np.maximum(size_QS, 1), 0, 1)
    found_QTS = truth_key_QT[:, :, None] == key_M[sid_QS][:, None, :]
    return (found_QTS * chance_QS[:, None, :]).sum(axis=(1, 2)) / wanted


def sample_rows(rows: int, size: int, *, seed: int = 0) -> np.ndarray:
    """`size` distinct row numbers of `rows`, ascending; all of them where there are no more."""
    if size >= rows:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, size, replace=False))


def _hide(d_QB: torch.Tensor, column_Q: np.ndarray) -> None:
    inside = np.flatnonzero((column_Q >= 0) & (column_Q < d_QB.shape[1]))
    d_QB[torch.from_numpy(inside), torch.from_numpy(column_Q[inside])] = torch.inf
