"""RQ-KMeans: the codes of a plain faiss loop and of a float64 oracle; tiny catalogues; options."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import pytest

from prerank_tools.errors import ContractError
from prerank_tools.quantizers.assign import assign_exact
from prerank_tools.quantizers.codebook import Quantizer, quantizer_of
from prerank_tools.quantizers.rkmeans import RKMeans, fitting_size
from prerank_tools.quantizers.sid_metrics import SidCounts


def vectors(rows: int = 4_000, dims: int = 24, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centre_CD = rng.standard_normal((60, dims))
    x_ND = centre_CD[rng.integers(0, 60, rows)] + 0.3 * rng.standard_normal((rows, dims))
    return (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float32)


def plain_faiss(x_ND: np.ndarray, sizes: tuple[int, ...], niter: int, seed: int) -> tuple[list, np.ndarray]:
    """What anyone would write: faiss k-means, search, subtract."""
    r_ND, codebooks, codes = x_ND.copy(), [], []
    for size in sizes:
        kmeans = faiss.Kmeans(x_ND.shape[1], size, niter=niter, seed=seed)
        kmeans.train(r_ND)
        _, code_N1 = kmeans.index.search(r_ND, 1)
        codebooks.append(kmeans.centroids)
        codes.append(code_N1[:, 0])
        r_ND = r_ND - kmeans.centroids[code_N1[:, 0]]
    return codebooks, np.stack(codes, axis=1)


def oracle(x_ND: np.ndarray, codebooks: list[np.ndarray]) -> np.ndarray:
    """Residual codes from float64 differences, one level after the other; the first of equal distances."""
    r_ND, codes = x_ND.astype(np.float64), []
    for codebook_KD in codebooks:
        distance_NK = np.stack([((r_ND - c_D.astype(np.float64)) ** 2).sum(axis=1) for c_D in codebook_KD], 1)
        codes.append(distance_NK.argmin(axis=1))
        r_ND = r_ND - codebook_KD[codes[-1]].astype(np.float64)
    return np.stack(codes, axis=1)


@pytest.mark.parametrize("small_work", [0, 10**15], ids=["fast path", "float64 path"])
@pytest.mark.parametrize("sizes", [(64, 64, 64), (32, 16, 8, 4)])
def test_codes_are_those_of_a_plain_faiss_loop_and_of_float64(
    sizes: tuple[int, ...], small_work: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prerank_tools.quantizers.assign.SMALL_WORK", small_work)
    x_ND = vectors()
    codebooks, codes_NL = plain_faiss(x_ND, sizes, 12, 7)
    ours = RKMeans(sizes=sizes, iterations=12, init="random").fit(x_ND, seed=7)
    for mine_KD, theirs_KD in zip(ours.codebooks, codebooks, strict=True):
        np.testing.assert_array_equal(mine_KD, theirs_KD)
    found_NL = ours.encode(x_ND)
    np.testing.assert_array_equal(found_NL, oracle(x_ND, codebooks))
    differing = np.flatnonzero((found_NL != codes_NL).any(axis=1))
    for row in differing:  # float32 near ties of faiss only
        level = int((found_NL[row] != codes_NL[row]).argmax())
        r_D = x_ND[row].astype(np.float64) - sum(codebooks[n][codes_NL[row, n]] for n in range(level))
        nearest_two = np.sort(((codebooks[level] - r_D) ** 2).sum(axis=1))[:2]
        assert nearest_two[1] - nearest_two[0] < 1e-5
    assert len(differing) <= 2


@pytest.mark.parametrize("init", ["random", "progressive"])
@pytest.mark.parametrize(("rows", "dims"), [(2_000, 24), (2_000, 200), (90, 200)])
def test_fit_repeats_and_does_not_depend_on_threads(init: Any, rows: int, dims: int) -> None:
    x_ND = vectors(rows, dims)
    one = RKMeans(sizes=(32, 32), iterations=5, init=init).fit(x_ND, seed=3, threads=1)
    two = RKMeans(sizes=(32, 32), iterations=5, init=init).fit(x_ND, seed=3, threads=2)
    assert one.to_codebook().fingerprint == two.to_codebook().fingerprint
    other = RKMeans(sizes=(32, 32), iterations=5, init=init).fit(x_ND, seed=4)
    assert other.to_codebook().fingerprint != one.to_codebook().fingerprint


def test_no_level_collapses_where_every_level_from_the_same_rows_does() -> None:
    # As benchmarks/generate.py makes them: noise around many centres.
    rng = np.random.default_rng(0)
    x_ND = (rng.standard_normal((1_000, 256)))[rng.integers(0, 1_000, 6_000)]
    x_ND = (x_ND + 0.6 * rng.standard_normal(x_ND.shape)).astype(np.float32)
    lowest = {}
    for init in ("progressive", "random"):
        fitted = RKMeans(sizes=(64, 64, 64), iterations=10, init=init).fit(x_ND)  # type: ignore[arg-type]
        counts = SidCounts(fitted.sizes)
        counts.update(fitted.encode(x_ND))
        lowest[init] = min(level.perplexity for level in counts.finalize().levels)
    assert RKMeans().init == "progressive"
    assert lowest["random"] < 64 / 4 < 64 / 2 < lowest["progressive"]


@pytest.mark.parametrize("init", ["random", "progressive"])
@pytest.mark.parametrize(
    "x_ND",
    [
        np.random.default_rng(0).standard_normal((60, 1)),
        np.random.default_rng(0).standard_normal((16, 4)),
        np.random.default_rng(0).standard_normal((20, 64)),
        np.outer(np.arange(50.0), np.ones(8)),
        np.zeros((40, 8)),
    ],
    ids=["one dim", "as many codes as rows", "fewer rows than dims", "one axis", "zeros"],
)
def test_odd_shapes_fit(x_ND: np.ndarray, init: Any) -> None:
    x_ND = x_ND.astype(np.float32)
    fitted = RKMeans(sizes=(16, 16), iterations=5, init=init).fit(x_ND)
    assert all(np.isfinite(codebook_KD).all() for codebook_KD in fitted.codebooks)
    left_ND = x_ND - fitted.decode(fitted.encode(x_ND))
    assert (left_ND**2).sum() <= 0.5 * (x_ND**2).sum()


def test_each_level_lowers_the_error_and_decode_inverts_encode() -> None:
    x_ND = vectors(2_000)
    errors = []
    for levels in (1, 2, 3):
        fitted = RKMeans(sizes=(32,) * levels, iterations=8).fit(x_ND)
        restored_ND = fitted.decode(fitted.encode(x_ND))
        errors.append(float(((x_ND - restored_ND) ** 2).sum(axis=1).mean()))
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]


@pytest.mark.parametrize(
    "options", [{}, {"normalize": "l2"}, {"residual_norm": True}, {"beam": 4}, {"normalize": "l2", "beam": 2}]
)
def test_a_saved_codebook_encodes_alike(options: dict) -> None:
    x_ND = 3.0 * vectors(800)
    fitted = RKMeans(sizes=(16, 8), iterations=5, **options).fit(x_ND)
    again = quantizer_of(fitted.to_codebook())
    assert isinstance(again, Quantizer)
    np.testing.assert_array_equal(again.encode(x_ND), fitted.encode(x_ND))
    np.testing.assert_array_equal(again.decode(fitted.encode(x_ND)), fitted.decode(fitted.encode(x_ND)))


def test_l2_ignores_length_and_plain_does_not() -> None:
    x_ND = vectors(500)
    long_ND = x_ND * np.linspace(1, 9, len(x_ND), dtype=np.float32)[:, None]
    l2 = RKMeans(sizes=(16, 16), iterations=5, normalize="l2").fit(x_ND)
    plain = RKMeans(sizes=(16, 16), iterations=5).fit(x_ND)
    assert (l2.encode(long_ND) == l2.encode(x_ND)).mean() > 0.999
    assert (plain.encode(long_ND) == plain.encode(x_ND)).mean() < 0.9


def test_beam_never_raises_the_error() -> None:
    x_ND = vectors(600)
    greedy = RKMeans(sizes=(16, 16, 16), iterations=5).fit(x_ND)
    wide = RKMeans.from_codebook(greedy.to_codebook())
    wide.beam = 8
    error = [((x_ND - q.decode(q.encode(x_ND))) ** 2).sum(axis=1) for q in (greedy, wide)]
    assert (error[1] <= error[0] + 1e-6).mean() > 0.98  # a beam may drop the greedy path, seldom
    assert error[1].mean() < error[0].mean()


def test_residual_norm_restores_lengths_on_average() -> None:
    x_ND = vectors(2_000)
    fitted = RKMeans(sizes=(32, 32, 32), iterations=8, residual_norm=True).fit(x_ND)
    error = ((x_ND - fitted.decode(fitted.encode(x_ND))) ** 2).sum(axis=1).mean()
    first = RKMeans(sizes=(32,), iterations=8).fit(x_ND)
    assert error < ((x_ND - first.decode(first.encode(x_ND))) ** 2).sum(axis=1).mean()


@pytest.mark.parametrize("rows", [5, 81, 1_741])
def test_small_catalogues_fit_at_the_advised_size(rows: int) -> None:
    x_ND = vectors(rows)
    fitted = RKMeans(sizes=(fitting_size(rows),) * 3, iterations=10).fit(x_ND)
    codes_NL = fitted.encode(x_ND)
    np.testing.assert_array_equal(codes_NL, assign_exact(x_ND, fitted.codebooks))
    assert {5: 2, 81: 16, 1_741: 256}[rows] == fitted.sizes[0]


def test_more_codes_than_rows_is_refused_with_a_size_that_fits() -> None:
    with pytest.raises(ContractError, match="256 codes a level, but only 81") as caught:
        RKMeans().fit(vectors(81))
    assert "16" in caught.value.hint


def test_identical_vectors_are_no_fault() -> None:
    x_ND = np.repeat(vectors(4), 30, axis=0)
    codes_NL = RKMeans(sizes=(8, 8), iterations=5).fit(x_ND).encode(x_ND)
    assert len(np.unique(codes_NL, axis=0)) == 4
