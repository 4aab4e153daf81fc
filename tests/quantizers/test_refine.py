"""Joint refinement: its codes are the beam's, its codebooks least squares, and it never does worse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prerank_tools.errors import UsageError
from prerank_tools.quantizers.assign import assign_beam
from prerank_tools.quantizers.refine import _least_squares, beam_codes, refine
from prerank_tools.quantizers.rkmeans import RKMeans

# N items, D dims, L levels, K codes
from tests.quantizers.test_rkmeans import vectors


def relative_error(x_ND: np.ndarray, fitted: RKMeans) -> float:
    left_ND = x_ND - fitted.decode(fitted.encode(x_ND))
    return float((left_ND**2).sum() / (x_ND**2).sum())


@pytest.mark.parametrize("beam", [1, 3, 16])
def test_codes_are_those_of_the_float64_beam(beam: int) -> None:
    x_ND = vectors(700)
    rng = np.random.default_rng(1)
    books = [0.5 * rng.standard_normal((size, 24)).astype(np.float32) for size in (16, 8, 12)]
    found = beam_codes(torch.from_numpy(x_ND), [torch.from_numpy(book) for book in books], beam)
    np.testing.assert_array_equal(found.numpy(), assign_beam(x_ND, books, beam=beam))


def test_sweeps_come_to_the_least_squares_solution() -> None:
    rng = np.random.default_rng(2)
    x_ND = rng.standard_normal((400, 5)).astype(np.float32)
    codes_NL = np.stack([rng.integers(0, 6, 400), rng.integers(0, 4, 400)], axis=1)
    hot_NK = np.concatenate([np.eye(6)[codes_NL[:, 0]], np.eye(4)[codes_NL[:, 1]]], axis=1)
    best_ND = hot_NK @ np.linalg.lstsq(hot_NK, x_ND.astype(np.float64), rcond=None)[0]
    levels, left = [torch.zeros(6, 5), torch.zeros(4, 5)], torch.from_numpy(x_ND)
    for _ in range(20):
        levels, left = _least_squares(levels, torch.from_numpy(codes_NL), left)
    np.testing.assert_allclose(x_ND - left.numpy(), best_ND, atol=1e-5)
    sums_ND = levels[0][codes_NL[:, 0]] + levels[1][codes_NL[:, 1]]
    np.testing.assert_allclose(sums_ND.numpy(), best_ND, atol=1e-5)


@pytest.mark.parametrize(("beam", "gain"), [(1, 0.99), (4, 0.95)])
def test_the_error_falls_under_the_own_beam(beam: int, gain: float) -> None:
    x_ND = vectors(3_000)
    plain = RKMeans(sizes=(32, 32, 32), iterations=8, beam=beam).fit(x_ND)
    fitted = RKMeans(sizes=(32, 32, 32), iterations=8, beam=beam, refine=15).fit(x_ND)
    assert relative_error(x_ND, fitted) < gain * relative_error(x_ND, plain)


def test_no_round_returns_worse_codebooks() -> None:
    x_ND = vectors(500)
    start = RKMeans(sizes=(16, 16), iterations=8).fit(x_ND)
    wild = refine(x_ND, start.codebooks, beam=1, rounds=2, noise=50.0, seed=0)
    found = RKMeans(sizes=(16, 16), codebooks=wild, scale_L=np.ones(2))
    assert relative_error(x_ND, found) <= relative_error(x_ND, start)


def test_refining_repeats_and_does_not_depend_on_threads() -> None:
    x_ND = vectors(2_000)
    books = [
        RKMeans(sizes=(32, 32), iterations=5, beam=2, refine=6).fit(x_ND, seed=seed, threads=threads)
        for seed, threads in [(3, 1), (3, 2), (4, 1)]
    ]
    prints = [fitted.to_codebook().fingerprint for fitted in books]
    assert prints[0] == prints[1] != prints[2]


def test_scaled_residuals_cannot_be_refined() -> None:
    with pytest.raises(UsageError, match="residual_norm"):
        RKMeans(sizes=(4, 4), iterations=2, residual_norm=True, refine=3).fit(vectors(100))
