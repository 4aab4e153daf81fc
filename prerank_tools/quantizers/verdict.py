"""A codebook's numbers in words: what is wrong and what to set; two codebooks compared; sizes for N items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prerank_tools.quantizers.sid_metrics import LevelUse, SidUse

# Thresholds are ours, set on the catalogues of benchmarks/quantizers.py unless a source is named.
COLLAPSED = 0.10  # perplexity below this share of K
STARVED = 0.10  # dead codes above this share of K
EVEN = 0.9995  # normalised entropy above it is closer to n/K +- 1 than data falls by itself
IDLE = 0.98  # distinct prefixes one level up, per distinct item, above which the last level parts nothing
CROWDED = 0.05  # collisions above the duplicate floor
POINTS_PER_CODE = 39  # faiss warns below
CELLS_PER_ITEM = 1_000  # 3 x 8192 for 1e8 items (TorchEasyRec) is 5,500; 3 x 256 for 12 k is 1,400
CELLS_NEEDED = 10  # cells an item without which small catalogues collide, however few items a code has

BETTER = {  # metric -> +1 where higher is better
    "collision_above_floor": -1,
    "exclusive_items": 1,
    "largest_sid": -1,
    "gini": -1,
    "relative_error": -1,
    "cosine": 1,
    "neighbour_recall": 1,
}


@dataclass(frozen=True)
class Finding:
    """One judgement: a word, what the numbers say, and the setting to try."""

    verdict: str
    because: str
    advice: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def judge(use: SidUse, *, floor: float = 0.0) -> list[Finding]:
    """Findings of a catalogue's SID use, worst first; one `healthy` where nothing is wrong."""
    findings = [
        *(_collapsed(number, level) for number, level in enumerate(use.levels, 1)),
        *(_starved(number, level, use.items) for number, level in enumerate(use.levels, 1)),
        *(_over_balanced(number, level) for number, level in enumerate(use.levels[:-1], 1)),
        _too_many_levels(use, floor),
        _crowded(use, floor),
    ]
    found = [finding for finding in findings if finding is not None]
    return found or [Finding("healthy", "every level is in use and items part", "nothing to change")]


def advise_sizes(items: int, *, levels: int = 3) -> tuple[int, ...]:
    """Level sizes for N items: a power of two with 1,000 cells an item.

    Fewer where a code would have under 39 items, but 10 cells an item at least.
    """

    def bits(cells: int) -> int:
        return math.ceil(math.log2((cells * max(items, 1)) ** (1 / levels)))

    affordable = max(int(math.log2(max(items // POINTS_PER_CODE, 2))), bits(CELLS_NEEDED))
    return (2 ** max(1, min(bits(CELLS_PER_ITEM), affordable, 16)),) * levels


def compare(ours: Mapping[str, float], theirs: Mapping[str, float]) -> list[dict[str, Any]]:
    """A/B: for every metric that both hold, the two values and which is better (`A`, `B`, `=`).

    A `<metric>_low` / `_high` interval on both sides makes overlapping values equal.
    """
    rows = []
    for metric, direction in BETTER.items():
        if metric in ours and metric in theirs:
            a, b = ours[metric], theirs[metric]
            better = "=" if _overlap(metric, ours, theirs) else "A" if direction * (a - b) > 0 else "B"
            rows.append({"metric": metric, "A": a, "B": b, "better": better})
    return rows


def _collapsed(number: int, level: LevelUse) -> Finding | None:
    if level.perplexity >= COLLAPSED * level.codes:
        return None
    return Finding(
        "collapsed",
        f"level {number} has perplexity {level.perplexity:.1f} of {level.codes} codes, "
        f"its fullest holds {level.largest_share:.1%} of the items",
        "k-means: init = 'progressive' (the default), or more rows to fit on, and look for items with one "
        "and the same vector; RQ-VAE: init = 'kmeans', dead_below = 0.5, sinkhorn = true",
    )


def _starved(number: int, level: LevelUse, items: int) -> Finding | None:
    if level.dead <= STARVED * level.codes:
        return None
    smaller = 2 ** int(math.log2(max(min(level.used, items // POINTS_PER_CODE), 2)))
    return Finding(
        "starved codes",
        f"level {number} never uses {level.dead} of {level.codes} codes; {items} items are "
        f"{items / level.codes:.1f} a code",
        f"{smaller} codes at level {number}, or more rows to fit on",
    )


def _over_balanced(number: int, level: LevelUse) -> Finding | None:
    if level.entropy < EVEN or level.codes < 8:
        return None
    return Finding(
        "over-balanced",
        f"level {number} has normalised entropy {level.entropy:.5f}: items were spread to fill codes, "
        "so near items were parted early",
        "balance the last level only (balance = 'last'); levels above it carry the hierarchy",
    )


def _too_many_levels(use: SidUse, floor: float) -> Finding | None:
    levels = use.levels
    contents = use.items * (1 - floor)
    if len(levels) < 2 or not contents or levels[-2].prefixes < IDLE * contents:
        return None
    return Finding(
        "too many levels",
        f"{levels[-2].prefixes} prefixes of {len(levels) - 1} levels part {contents:.0f} distinct items",
        f"{len(levels) - 1} levels, or fewer codes a level",
    )


def _crowded(use: SidUse, floor: float) -> Finding | None:
    above = use.collision_rate - floor
    if above <= CROWDED:
        return None
    advised = advise_sizes(use.items, levels=len(use.levels))
    larger = math.prod(advised) > math.prod(level.codes for level in use.levels)
    sizes = f", or sizes {' x '.join(map(str, advised))}" if larger else ""
    return Finding(
        "crowded",
        f"{above:.1%} of the items collide beyond duplicates, {use.largest_sid} on one SID",
        f"a collision policy (suffix, capacity, optimal), one level more{sizes}",
    )


def _overlap(metric: str, ours: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    if ours[metric] == theirs[metric]:
        return True
    bounds: Sequence[float | None] = [
        side.get(f"{metric}_{end}") for side in (ours, theirs) for end in ("low", "high")
    ]
    if any(bound is None for bound in bounds):
        return False
    low_a, high_a, low_b, high_b = (float(bound) for bound in bounds if bound is not None)
    return low_a <= high_b and low_b <= high_a
