"""Whether a frozen codebook still fits, and what a refit moved: PSI, distances, churn, codebook matching."""
# N items, D dims, L levels, K codes of a level

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prerank_tools.quantizers.codebook import Codebook

DRAWS = 200  # samples that say how large a PSI chance alone gives
SMOOTHING = 0.5  # added to every count, so that an empty code is rare rather than impossible


@dataclass(frozen=True)
class Drift:
    """New items against the fit set: each level's PSI, what chance explains of it, distance ratio."""

    items: int
    psi_L: tuple[float, ...]
    chance_L: tuple[float, ...]  # 99th percentile of the PSI of as many items drawn from the fit set
    distance_L: tuple[float, ...]  # mean distance to the level's centroid, over the reference's
    distance_chance_L: tuple[float, ...]  # what three standard errors of that ratio reach

    @property
    def excess(self) -> float:
        """The largest PSI of a level beyond chance."""
        return max(max(0.0, psi - chance) for psi, chance in zip(self.psi_L, self.chance_L, strict=True))

    @property
    def farther(self) -> float:
        """The largest distance ratio of a level, less what chance explains of it."""
        both = zip(self.distance_L, self.distance_chance_L, strict=True)
        return max(ratio - (chance - 1.0) for ratio, chance in both)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        per_level = [
            {"psi": psi, "psi_by_chance": chance, "distance_ratio": ratio}
            for psi, chance, ratio in zip(self.psi_L, self.chance_L, self.distance_L, strict=True)
        ]
        return {"items": self.items, "psi_above_chance": self.excess, "levels": per_level}


def fit_stats(codes_NL: np.ndarray, error_NL: np.ndarray, sizes: Sequence[int]) -> dict[str, np.ndarray]:
    """What the drift guard holds new items against: uses of every code, distances at every level.

    `error_NL` are squared distances of items that the codebook was not fitted on, where it follows single
    items: a codebook with few items a code lies closer to those than to any other.
    """
    stats: dict[str, np.ndarray] = {
        f"uses.{level:02d}": uses_K for level, uses_K in enumerate(uses(codes_NL, sizes))
    }
    distance_NL = np.sqrt(error_NL.astype(np.float64))
    return stats | {"distance": distance_NL.mean(axis=0), "spread": distance_NL.std(axis=0)}


def measure_drift(
    codes_NL: np.ndarray, error_NL: np.ndarray, stats: Mapping[str, np.ndarray], sizes: Sequence[int]
) -> Drift:
    """Hold new items' codes and squared distances (N, L) against the `fit_stats` of a codebook.

    Fifty items spread over 256 codes have a large PSI whatever they are, so each level's is given beside the
    99th percentile of samples of equal size from the fit set (ours); only what is beyond it counts.
    """
    met = NewItems(sizes)
    met.update(codes_NL, error_NL)
    return met.drift(stats)


class NewItems:
    """New items met part by part: their number, uses of every code, summed distance at every level."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.items = 0
        self.uses = [np.zeros(size, dtype=np.int64) for size in sizes]
        self.distance_L = np.zeros(len(sizes))

    def update(self, codes_NL: np.ndarray, error_NL: np.ndarray) -> None:
        """Count a batch by its codes and squared distances (N, L)."""
        self.items += len(codes_NL)
        for total_K, new_K in zip(self.uses, uses(codes_NL, [len(u) for u in self.uses]), strict=True):
            total_K += new_K
        self.distance_L += np.sqrt(error_NL.astype(np.float64)).sum(axis=0)

    def drift(self, stats: Mapping[str, np.ndarray]) -> Drift:
        """All items met, held against the `fit_stats` of a codebook."""
        rng = np.random.default_rng(0)
        psi_L, chance_L = [], []
        for level, new_K in enumerate(self.uses):
            fit_K = stats[f"uses.{level:02d}"]
            draw_SK = rng.multinomial(self.items, fit_K / fit_K.sum(), size=DRAWS)
            psi_L.append(float(psi(new_K[None], fit_K)[0]))
            chance_L.append(float(np.quantile(psi(draw_SK, fit_K), 0.99)))
        base_L = np.maximum(stats["distance"], 1e-12)
        ratio_L = self.distance_L / self.items / base_L
        luck_L = 1.0 + 3.0 * stats["spread"] / base_L / np.sqrt(self.items)
        return Drift(
            self.items, tuple(psi_L), tuple(chance_L), tuple(ratio_L.tolist()), tuple(luck_L.tolist())
        )


def psi(new_SK: np.ndarray, fit_K: np.ndarray) -> np.ndarray:
    """Population stability index of each row of counts against the fit set's counts; (S,)."""
    new_SK = (new_SK + SMOOTHING) / (new_SK + SMOOTHING).sum(axis=1, keepdims=True)
    share_K = (fit_K + SMOOTHING) / (fit_K + SMOOTHING).sum()
    return ((new_SK - share_K) * np.log(new_SK / share_K)).sum(axis=1)


def uses(codes_NL: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """How often every code of every level is used."""
    return [np.bincount(codes_NL[:, level], minlength=size) for level, size in enumerate(sizes)]


def churn(before_NL: np.ndarray, after_NL: np.ndarray) -> dict[str, float]:
    """Share of items whose codes moved, down to each level: `level_1`, `level_1_2`, ..., the last is the SID.

    Tables with another number of levels are compared over the levels that both have.
    """
    met = Churn()
    met.update(before_NL, after_NL)
    return met.shares()


class Churn:
    """`churn` met batch by batch."""

    def __init__(self) -> None:
        self.items = 0
        self.moved_L = np.zeros(0, dtype=np.int64)

    def update(self, before_NL: np.ndarray, after_NL: np.ndarray) -> None:
        """Compare a batch of items."""
        levels = min(before_NL.shape[1], after_NL.shape[1])
        moved_NL = np.logical_or.accumulate(before_NL[:, :levels] != after_NL[:, :levels], axis=1)
        self.items += len(moved_NL)
        self.moved_L = moved_NL.sum(axis=0) + (self.moved_L if len(self.moved_L) else 0)

    def shares(self) -> dict[str, float]:
        """Of all items met."""
        names = [
            "level_" + "_".join(str(n + 1) for n in range(level + 1)) for level in range(len(self.moved_L))
        ]
        return {
            name: int(moved) / max(self.items, 1) for name, moved in zip(names, self.moved_L, strict=True)
        }


def match_codebook(new: Codebook, old: Codebook) -> Codebook:
    """Renumber the codes of `new` so that each is the one of `old` that it lies nearest to, one to one.

    Hungarian on squared centroid distances, level by level (ours). A renumbering changes no reconstruction;
    codes without a counterpart take the numbers left, in their own order. Raises nothing: levels of another
    width stay as they are.
    """
    codebooks, stats = list(new.codebooks), dict(new.stats)
    for level, (new_KD, old_KD) in enumerate(zip(new.codebooks, old.codebooks, strict=False)):
        if new_KD.shape[1] != old_KD.shape[1]:
            continue
        order_K = _matched_order(new_KD, old_KD)
        codebooks[level] = new_KD[order_K]
        if f"uses.{level:02d}" in stats:
            stats[f"uses.{level:02d}"] = stats[f"uses.{level:02d}"][order_K]
    return replace(new, codebooks=tuple(codebooks), stats=stats)


def _matched_order(new_KD: np.ndarray, old_KD: np.ndarray) -> np.ndarray:
    """For each number, the row of `new_KD` that takes it."""
    from scipy.optimize import linear_sum_assignment

    new_KD, old_KD = new_KD.astype(np.float64), old_KD.astype(np.float64)
    cost_KJ = (new_KD**2).sum(1)[:, None] + (old_KD**2).sum(1) - 2.0 * new_KD @ old_KD.T
    rows, numbers = linear_sum_assignment(cost_KJ)
    order_K = np.full(len(new_KD), -1)
    kept = numbers < len(new_KD)
    order_K[numbers[kept]] = rows[kept]
    order_K[order_K < 0] = np.setdiff1d(np.arange(len(new_KD)), order_K)
    return order_K
