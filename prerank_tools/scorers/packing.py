"""Requests as arrays, and packs of them as training or scoring batches."""

# R requests, n candidates over all requests, N items, F features, K tasks
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RequestArrays:
    """Requests flattened: candidates of request r are rows `offset_R[r] .. offset_R[r + 1]`."""

    user_RF: np.ndarray  # float32: inputs of the user tower
    offset_R: np.ndarray  # int64 [R + 1]
    item_n: np.ndarray  # int64: row of the candidate in the item features
    cross_nF: np.ndarray  # float32: inputs of the cross tower
    label_nK: np.ndarray  # float32, NaN where a task has no label for the candidate

    @property
    def request_n(self) -> np.ndarray:
        """Which request each candidate belongs to."""
        return np.repeat(np.arange(len(self.offset_R) - 1), np.diff(self.offset_R))


@dataclass(frozen=True)
class ItemArrays:
    """Static features of every item; row N - 1 stands for items that are not in the catalogue."""

    item_NF: np.ndarray  # float32
    codes_NC: np.ndarray  # int64, -1 is unknown


def pack(
    requests: RequestArrays, items: ItemArrays, chosen_B: np.ndarray, *, keep_n: np.ndarray | None = None
) -> dict[str, Tensor]:
    """The batch of the chosen requests, each distinct item once; rows outside `keep_n` are left out."""
    rows_n, request_n = candidate_rows(requests.offset_R, chosen_B)
    if keep_n is not None:
        kept = keep_n[rows_n]
        rows_n, request_n = rows_n[kept], request_n[kept]
    item_m, item_of_n = np.unique(requests.item_n[rows_n], return_inverse=True)
    arrays = {
        "user_BF": requests.user_RF[chosen_B],
        "item_mF": items.item_NF[item_m],
        "codes_mC": items.codes_NC[item_m],
        "item_of_n": item_of_n.reshape(-1),
        "request_of_n": request_n,
        "cross_nF": requests.cross_nF[rows_n],
        "label_nK": requests.label_nK[rows_n],
    }
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def candidate_rows(offset_R: np.ndarray, chosen_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the chosen requests' candidates, and for each the place of its request in `chosen_B`."""
    size_B = offset_R[chosen_B + 1] - offset_R[chosen_B]
    request_n = np.repeat(np.arange(len(chosen_B)), size_B)
    within_n = np.arange(len(request_n)) - np.repeat(np.cumsum(size_B) - size_B, size_B)
    return offset_R[chosen_B][request_n] + within_n, request_n


def join_requests(parts: Sequence[RequestArrays]) -> RequestArrays:
    """Several sets of requests, one after the other."""
    size_R = np.concatenate([np.diff(part.offset_R) for part in parts])
    return RequestArrays(
        user_RF=np.concatenate([part.user_RF for part in parts]),
        offset_R=np.r_[0, np.cumsum(size_R)].astype(np.int64),
        item_n=np.concatenate([part.item_n for part in parts]),
        cross_nF=np.concatenate([part.cross_nF for part in parts]),
        label_nK=np.concatenate([part.label_nK for part in parts]),
    )


def sample_negatives(label_nK: np.ndarray, rate: float, *, seed: int) -> np.ndarray | None:
    """Which candidates training keeps (bool [n]): every positive and `rate` of the rest; None for all."""
    if rate >= 1:
        return None
    positive_n = (np.nan_to_num(label_nK) > 0).any(1)
    return positive_n | (np.random.default_rng(seed).random(len(label_nK)) < rate)
