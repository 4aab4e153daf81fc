"""The verdict names what was built into the codes, and the advice grows with the catalogue."""

from __future__ import annotations

import numpy as np
import pytest

from prerank_tools.quantizers.sid_metrics import SidCounts
from prerank_tools.quantizers.verdict import advise_sizes, compare, judge


def verdicts(codes: np.ndarray, sizes: tuple[int, ...], floor: float = 0.0) -> set[str]:
    counts = SidCounts(sizes)
    counts.update(codes)
    return {finding.verdict for finding in judge(counts.finalize(), floor=floor)}


def skewed(rng: np.random.Generator, rows: int, codes: int) -> np.ndarray:
    return (rng.random(rows) ** 1.5 * codes).astype(int)


def test_healthy() -> None:
    rng = np.random.default_rng(0)
    codes = np.stack([skewed(rng, 5_000, 64) for _ in range(3)], axis=1)
    assert verdicts(codes, (64,) * 3) == {"healthy"}


def test_collapsed_level() -> None:
    rng = np.random.default_rng(0)
    codes = np.stack([skewed(rng, 5_000, 64), np.full(5_000, 3), skewed(rng, 5_000, 64)], axis=1)
    assert "collapsed" in verdicts(codes, (64,) * 3)


def test_starved_codes_advise_fewer() -> None:
    rng = np.random.default_rng(0)
    codes = np.stack([skewed(rng, 5_000, 64), skewed(rng, 5_000, 40), skewed(rng, 5_000, 64)], axis=1)
    counts = SidCounts((64,) * 3)
    counts.update(codes)
    (finding,) = judge(counts.finalize())
    assert finding.verdict == "starved codes" and finding.advice.startswith("32 codes at level 2")


def test_over_balanced_first_level_but_not_a_balanced_last_one() -> None:
    rng = np.random.default_rng(0)
    even, uneven = np.arange(6_400) % 64, skewed(rng, 6_400, 64)
    assert "over-balanced" in verdicts(np.stack([even, uneven, rng.permutation(uneven)], axis=1), (64,) * 3)
    assert verdicts(np.stack([rng.permutation(uneven), uneven, even], axis=1), (64,) * 3) == {"healthy"}


def test_too_many_levels() -> None:
    rng = np.random.default_rng(0)
    codes = np.stack([skewed(rng, 1_000, 64) for _ in range(5)], axis=1)
    assert "too many levels" in verdicts(codes, (64,) * 5)


def test_crowded_is_judged_above_the_floor() -> None:
    rng = np.random.default_rng(0)
    codes = np.repeat(np.stack([skewed(rng, 2_000, 64) for _ in range(2)], axis=1), 2, axis=0)
    assert "crowded" in verdicts(codes, (64,) * 2)
    small = np.repeat(np.arange(40) % 16, 2)[:, None]
    assert [advice_of(small, (size,)) for size in (16, 1_024)] == [True, False]
    assert "crowded" not in verdicts(codes, (64,) * 2, floor=0.95)


def advice_of(codes: np.ndarray, sizes: tuple[int, ...]) -> bool:
    """Whether a crowded catalogue is told of sizes, which must be larger than its own."""
    counts = SidCounts(sizes)
    counts.update(codes)
    (finding,) = [finding for finding in judge(counts.finalize()) if finding.verdict == "crowded"]
    return "sizes" in finding.advice


@pytest.mark.parametrize(
    ("items", "sizes"),
    [(12_101, (256,) * 3), (100_000_000, (8192,) * 3), (1_000_000, (1024,) * 3), (81, (16,) * 3)],
)
def test_size_advice(items: int, sizes: tuple[int, ...]) -> None:
    assert advise_sizes(items) == sizes


def test_compare_knows_directions_and_intervals() -> None:
    ours = {"relative_error": 0.3, "gini": 0.2, "neighbour_recall": 0.5}
    ours |= {"neighbour_recall_low": 0.48, "neighbour_recall_high": 0.52}
    theirs = {"relative_error": 0.4, "gini": 0.1, "neighbour_recall": 0.51}
    theirs |= {"neighbour_recall_low": 0.49, "neighbour_recall_high": 0.53}
    rows = {row["metric"]: row["better"] for row in compare(ours, theirs)}
    assert rows == {"gini": "B", "relative_error": "A", "neighbour_recall": "="}
