"""Batches of rows that fit in memory: shuffled anew each epoch, shared out between ranks."""

# N rows, B rows of one rank's batch
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ShuffledRows:
    """`make(rows_B)` turns row numbers into what the model takes; the order is a function of (seed, epoch).

    The last batch may be smaller. Rank r of w takes every w-th row of a batch from its r-th on; a batch with
    fewer rows than ranks is filled from the front of the epoch's order, so that no rank is left without.
    """

    rows: int
    make: Callable[[np.ndarray], Any]
    batch_size: int
    seed: int = 42

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def epoch(self, number: int, *, rank: int = 0, world: int = 1) -> Iterator[Any]:
        """This rank's batches of one epoch."""
        order_N = np.random.default_rng([self.seed, number]).permutation(self.rows)
        for start in range(0, self.rows, self.batch_size):
            rows_B = order_N[start : start + self.batch_size]
            if len(rows_B) < world:
                rows_B = np.concatenate([rows_B, np.resize(order_N, world - len(rows_B))])
            yield self.make(rows_B[rank::world])
