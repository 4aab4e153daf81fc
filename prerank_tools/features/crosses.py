"""User x item features of one request's candidates, computed where they are used and never stored."""

# n candidates (flat over requests), E events
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prerank_tools.features.statistics import ALL_TIME, DAY, PastCounts, compress, statistics

CROSS_WINDOWS = (7 * DAY, 30 * DAY, ALL_TIME)


@dataclass(frozen=True)
class PastLog:
    """The events in integer codes: users, items and categories as 0, 1, 2, ...; -1 is "unknown"."""

    user_E: np.ndarray
    item_E: np.ndarray
    time_E: np.ndarray
    visible_at_E: np.ndarray | None = None
    category_E: np.ndarray | None = None


class CrossFeatures:
    """Past counts of (user, item) and (user, category), and the recency of the same item, as of each T."""

    def __init__(self, log: PastLog, *, windows: Sequence[int] = CROSS_WINDOWS) -> None:
        self.windows = tuple(windows)
        self.has_category = log.category_E is not None
        self.same_item = PastCounts(
            _pair(log.user_E, log.item_E), log.time_E, log.visible_at_E, windows=windows
        )
        if log.category_E is not None:
            self.same_category = PastCounts(
                _pair(log.user_E, log.category_E), log.time_E, log.visible_at_E, windows=windows
            )

    @property
    def width(self) -> int:
        """Number of columns that `compute` gives."""
        return (len(self.windows) + 1) * (2 if self.has_category else 1)

    def compute(
        self,
        user_n: np.ndarray,
        item_n: np.ndarray,
        as_of_n: np.ndarray,
        category_n: np.ndarray | None = None,
    ) -> np.ndarray:
        """Log-compressed cross features, float32 [n, width]; codes of -1 (unknown) have no past."""
        blocks = [self._block(self.same_item, user_n, item_n, as_of_n)]
        if self.has_category:
            if category_n is None:
                raise ValueError("the log has categories: the candidates need theirs")
            blocks.append(self._block(self.same_category, user_n, category_n, as_of_n))
        return compress(np.concatenate(blocks, axis=1))

    def _block(
        self, past: PastCounts, user_n: np.ndarray, other_n: np.ndarray, as_of_n: np.ndarray
    ) -> np.ndarray:
        known_n = (np.asarray(user_n) >= 0) & (np.asarray(other_n) >= 0)
        pair_n = np.where(known_n, _pair(user_n, other_n), -1)
        block = statistics(past, pair_n, as_of_n)
        block[~known_n] = [0] * len(self.windows) + [-1]  # two unknowns are not the same thing
        return block


def _pair(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two int32 codes in one int64."""
    return (np.asarray(left, dtype=np.int64) << 32) | (np.asarray(right, dtype=np.int64) & 0xFFFFFFFF)
