"""Drift against the fit set, churn after a refit, and matching one codebook to another."""

from __future__ import annotations

import numpy as np
import pytest

from prerank_tools.quantizers.codebook import Codebook
from prerank_tools.quantizers.drift import churn, fit_stats, match_codebook, measure_drift, psi, uses


def test_psi_golden() -> None:
    # shares .4 .6 against .5 .5, counts so large that the smoothing is lost: .1 ln(.5/.4) + .1 ln(.6/.5)
    expected = 0.1 * np.log(0.5 / 0.4) + 0.1 * np.log(0.6 / 0.5)
    assert psi(np.array([[4e9, 6e9]]), np.array([5e9, 5e9]))[0] == pytest.approx(expected, rel=1e-6)
    assert psi(np.array([[30, 70]]), np.array([30, 70]))[0] == 0.0


def sample(rows: int, seed: int, tilt: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Codes with a skewed use of 64 codes a level; `tilt` moves mass to the high codes."""
    rng = np.random.default_rng(seed)
    share_K = np.exp(-np.arange(64) / 20 * (1 - tilt))
    codes_NL = rng.choice(64, size=(rows, 2), p=share_K / share_K.sum())
    return codes_NL.astype(np.uint16), rng.uniform(0.5, 1.5, (rows, 2))


@pytest.mark.parametrize("rows", [20, 300, 5_000])
def test_items_like_the_fit_set_are_within_chance(rows: int) -> None:
    stats = fit_stats(*sample(20_000, 0), (64, 64))
    drifts = [measure_drift(*sample(rows, seed), stats, (64, 64)) for seed in range(1, 11)]
    assert max(drift.excess for drift in drifts) < 0.1
    assert max(drift.farther for drift in drifts) < 1.2


def test_a_few_like_items_have_a_large_psi_by_chance_alone() -> None:
    stats = fit_stats(*sample(20_000, 0), (64, 64))
    drift = measure_drift(*sample(20, 1), stats, (64, 64))
    assert max(drift.psi_L) > 0.25 > drift.excess  # 0.25 is the usual alarm


def test_another_mix_and_farther_items_show() -> None:
    stats = fit_stats(*sample(20_000, 0), (64, 64))
    codes_NL, error_NL = sample(1_000, 1, tilt=1.0)
    drift = measure_drift(codes_NL, 4 * error_NL, stats, (64, 64))
    assert drift.excess > 0.25
    assert drift.farther == pytest.approx(2.0, rel=0.05)
    assert drift.as_dict()["levels"][0]["psi"] == drift.psi_L[0]


def test_uses_count_every_code() -> None:
    counted = uses(np.array([[0, 2], [0, 1], [3, 1]]), (4, 3))
    assert [uses_K.tolist() for uses_K in counted] == [[2, 0, 0, 1], [0, 2, 1]]


def test_churn_by_prefix() -> None:
    before = np.array([[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]])
    after = np.array([[1, 1, 1], [2, 2, 9], [3, 9, 3], [9, 4, 4]])
    assert churn(before, after) == {"level_1": 0.25, "level_1_2": 0.5, "level_1_2_3": 0.75}
    assert churn(before, after[:, :1]) == {"level_1": 0.25}
    assert churn(before[:0], after[:0])["level_1"] == 0.0


def book(*levels: np.ndarray) -> Codebook:
    stats = {f"uses.{n:02d}": np.arange(len(level)) for n, level in enumerate(levels)}
    return Codebook(kind="rkmeans", codebooks=levels, width=levels[0].shape[1], stats=stats)


def test_matching_undoes_a_renumbering() -> None:
    rng = np.random.default_rng(0)
    old_KD = rng.standard_normal((40, 8)).astype(np.float32)
    order_K = rng.permutation(40)
    shuffled_KD = (old_KD + 0.01 * rng.standard_normal(old_KD.shape))[order_K].astype(np.float32)
    matched = match_codebook(book(shuffled_KD, old_KD[:3]), book(old_KD, old_KD[:3]))
    np.testing.assert_allclose(matched.codebooks[0], old_KD, atol=0.1)
    np.testing.assert_array_equal(matched.stats["uses.00"], np.argsort(order_K))


@pytest.mark.parametrize("sizes", [(6, 4), (4, 6)])
def test_matching_codebooks_of_other_sizes_keeps_every_code(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    new_KD, old_KD = (rng.standard_normal((size, 3)).astype(np.float32) for size in sizes)
    matched_KD = match_codebook(book(new_KD), book(old_KD)).codebooks[0]
    assert sorted(map(tuple, matched_KD)) == sorted(map(tuple, new_KD))
