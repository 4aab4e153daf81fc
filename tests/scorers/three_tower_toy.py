"""A small three-tower model and packed requests that several tests share."""

from __future__ import annotations

import numpy as np
import torch

from prerank_tools.scorers.packing import ItemArrays, RequestArrays
from prerank_tools.scorers.three_tower import InputShape, ThreeTower, ThreeTowerConfig

SHAPE = InputShape(
    user_blocks={"history": 6, "vector": 4, "context": 3},
    item_blocks={"content": 6, "numbers": 2},
    cross_blocks={"statistics": 5, "crosses": 4},
    code_sizes={"level_0": 8, "level_1": 8, "category": 3},
    tasks=("click", "like"),
)


def three_tower(seed: int = 0, **config: object) -> ThreeTower:
    torch.manual_seed(seed)
    return ThreeTower(SHAPE, ThreeTowerConfig(**{"dropout": 0.0, **config})).eval()  # type: ignore[arg-type]


def arrays(requests: int = 5, items: int = 9, seed: int = 0) -> tuple[RequestArrays, ItemArrays]:
    rng = np.random.default_rng(seed)
    offset = np.r_[0, np.cumsum(rng.integers(1, 7, requests))]
    n = int(offset[-1])
    packed = RequestArrays(
        user_RF=rng.normal(size=(requests, 13)).astype(np.float32),
        offset_R=offset,
        item_n=rng.integers(0, items, n),
        cross_nF=rng.normal(size=(n, 9)).astype(np.float32),
        label_nK=rng.integers(0, 2, (n, 2)).astype(np.float32),
    )
    codes = rng.integers(-1, 3, (items, 3))
    return packed, ItemArrays(rng.normal(size=(items, 8)).astype(np.float32), codes)
