"""Do SID prefixes mean something? Purity and NMI against categories, and lift of items bought together."""

# N items, L levels, P prefixes, C categories, E pairs of items bought together
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from prerank_tools.quantizers.sid_keys import pack_codes


@dataclass(frozen=True)
class PrefixMeaning:
    """Agreement of the prefixes of one depth with one category column.

    Purity rises with the number of prefixes whatever they mean, so it stands beside its value when the
    categories are shuffled over the items.
    """

    depth: int
    prefixes: int
    purity: float
    purity_by_chance: float
    nmi: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def prefix_meaning(
    codes_NL: np.ndarray, category_N: np.ndarray, *, sizes: Sequence[int], seed: int = 0
) -> list[PrefixMeaning]:
    """Purity and NMI of the prefixes of depth 1 .. L with a category a row (any dtype; drop nulls first)."""
    _, category_N = np.unique(category_N, return_inverse=True)
    shuffled_N = np.random.default_rng(seed).permutation(category_N)
    found = []
    for depth in range(1, len(sizes) + 1):
        _, prefix_N = np.unique(pack_codes(codes_NL[:, :depth], sizes[:depth]), return_inverse=True)
        found.append(
            PrefixMeaning(
                depth=depth,
                prefixes=int(prefix_N.max(initial=-1)) + 1,
                purity=purity(prefix_N, category_N),
                purity_by_chance=purity(prefix_N, shuffled_N),
                nmi=normalised_mutual_information(prefix_N, category_N),
            )
        )
    return found


def purity(prefix_N: np.ndarray, category_N: np.ndarray) -> float:
    """Share of items that belong to the most frequent category of their prefix."""
    prefix_U, _, count_U = _contingency(prefix_N, category_N)
    most_P = np.zeros(int(prefix_N.max(initial=-1)) + 1, dtype=np.int64)
    np.maximum.at(most_P, prefix_U, count_U)
    return float(most_P.sum() / max(len(prefix_N), 1))


def normalised_mutual_information(prefix_N: np.ndarray, category_N: np.ndarray) -> float:
    """Mutual information over the mean of the two entropies, as scikit-learn's default."""
    prefix_U, category_U, count_U = _contingency(prefix_N, category_N)
    joint_U = count_U / max(count_U.sum(), 1)
    prefix_P = np.bincount(prefix_U, weights=joint_U)
    category_C = np.bincount(category_U, weights=joint_U)
    mutual = (joint_U * np.log(joint_U / (prefix_P[prefix_U] * category_C[category_U]))).sum()
    mean = (_entropy(prefix_P) + _entropy(category_C)) / 2
    return float(max(mutual, 0.0) / mean) if mean > 0 else 1.0


@dataclass(frozen=True)
class Lift:
    """How much likelier two items bought together share a prefix than two items of equal popularity."""

    depth: int
    together: float
    chance: float
    lift: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def behavior_lift(
    codes_NL: np.ndarray, left_E: np.ndarray, right_E: np.ndarray, *, sizes: Sequence[int]
) -> list[Lift]:
    """Lift by depth over pairs of distinct items (row numbers into the codes).

    Chance is exact: two different items drawn independently by how often they occur in the pairs.
    """
    apart_E = left_E != right_E
    left_E, right_E = left_E[apart_E], right_E[apart_E]
    weight_N = np.bincount(np.concatenate([left_E, right_E]), minlength=len(codes_NL)).astype(np.float64)
    weight_N /= max(weight_N.sum(), 1.0)
    same_item = float((weight_N**2).sum())
    found = []
    for depth in range(1, len(sizes) + 1):
        _, prefix_N = np.unique(pack_codes(codes_NL[:, :depth], sizes[:depth]), return_inverse=True)
        weight_P = np.bincount(prefix_N, weights=weight_N)
        together = float((prefix_N[left_E] == prefix_N[right_E]).mean()) if len(left_E) else 0.0
        chance = max(float((weight_P**2).sum()) - same_item, 0.0) / max(1 - same_item, 1e-12)
        found.append(Lift(depth, together, chance, together / chance if chance > 0 else float("nan")))
    return found


def _contingency(prefix_N: np.ndarray, category_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    categories = int(category_N.max(initial=-1)) + 1
    cell_U, count_U = np.unique(prefix_N.astype(np.int64) * categories + category_N, return_counts=True)
    return cell_U // max(categories, 1), cell_U % max(categories, 1), count_U


def _entropy(share: np.ndarray) -> float:
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())
