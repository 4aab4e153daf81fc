"""Assignment with torch: float16 guesses, doubts settled in float64; the kernel where there is a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from prerank_tools.quantizers import assign_levels
from prerank_tools.quantizers import assign_torch as gpu
from prerank_tools.quantizers.assign import assign_exact, nearest
from prerank_tools.quantizers.assign_settle import measure_all
from prerank_tools.quantizers.kmeans_progressive import kmeans_progressive
from prerank_tools.quantizers.kmeans_torch import axes_steps, kmeans_torch


def hard(
    scale: float = 1.0, shift: float = 0.0, dims: int = 48, sizes: tuple[int, ...] = (200, 256, 31)
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Vectors without structure, some halfway between two codes, some on a code, and one code twice."""
    rng = np.random.default_rng(0)
    codebooks = [
        (rng.standard_normal((size, dims)) / 1.2**level / 8).astype(np.float32)
        for level, size in enumerate(sizes)
    ]
    x_ND = (rng.standard_normal((800, dims)) / 8).astype(np.float32)
    a_N, b_N = rng.integers(0, sizes[0], (2, 200))
    x_ND[:200] = (codebooks[0][a_N].astype(np.float64) + codebooks[0][b_N]) / 2
    x_ND[200:220] = codebooks[0][:20]
    codebooks[0][min(77, sizes[0] - 1)] = codebooks[0][5]
    codebooks[0] = codebooks[0] + np.float32(shift)
    return (x_ND + np.float32(shift)) * np.float32(scale), [c_KD * np.float32(scale) for c_KD in codebooks]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.0, 2.0), (1e-5, 0.0), (3e5, 0.0)])
@pytest.mark.parametrize("table_codes", [1_024, 1])
def test_codes_are_exact_and_every_wrong_guess_was_in_doubt(
    monkeypatch: pytest.MonkeyPatch, dtype: type, scale: float, shift: float, table_codes: int
) -> None:
    if dtype == np.float16 and scale > 1:
        pytest.skip("beyond the range of float16")
    monkeypatch.setattr(assign_levels, "TABLE_CODES", table_codes)
    x_ND, codebooks = hard(scale, shift)
    x_ND = x_ND.astype(dtype)
    exact_NL = assign_exact(x_ND, codebooks)
    levels, x = assign_levels.put_levels(codebooks, "cpu"), torch.from_numpy(x_ND)
    guessed = gpu.guess(x, levels, gpu.nearest_torch)
    wrong_NL = guessed.codes_nL.numpy() != exact_NL
    rows = np.flatnonzero(wrong_NL.any(axis=1))
    first = wrong_NL[rows].argmax(axis=1)
    assert len(rows)
    assert (guessed.doubt_n.numpy()[rows] >> first & 1).all()
    runner = guessed.runner_nL.numpy()[rows, first] == exact_NL[rows, first]
    assert (runner | (guessed.doubt_n.numpy()[rows] >> (first + assign_levels.MANY) & 1).astype(bool)).all()
    gpu.settle(x, guessed, levels)
    np.testing.assert_array_equal(guessed.codes_nL.numpy(), exact_NL)


def test_measuring_all_codes_is_exact() -> None:
    x_ND, codebooks = hard()
    codes_NL, on_cpu = measure_all(torch.from_numpy(x_ND), assign_levels.put_levels(codebooks, "cpu"))
    np.testing.assert_array_equal(codes_NL.numpy(), assign_exact(x_ND, codebooks))
    assert 0 < on_cpu < 400  # those halfway between two codes, and those at a code that is there twice


def test_rows_beyond_float16_are_settled() -> None:
    x_ND, codebooks = hard()
    x_ND[:5] *= 1e6
    np.testing.assert_array_equal(
        gpu.assign_torch(x_ND, codebooks, device="cpu"), assign_exact(x_ND, codebooks)
    )


def test_int8_and_uneven_levels() -> None:
    rng = np.random.default_rng(0)
    x_ND = rng.integers(-127, 128, (500, 32)).astype(np.int8)
    codebooks = [rng.integers(-50, 50, (size, 32)).astype(np.float32) for size in (40, 1, 7)]
    np.testing.assert_array_equal(
        gpu.assign_torch(x_ND, codebooks, device="cpu"), assign_exact(x_ND, codebooks)
    )


def test_kmeans_lowers_the_error_repeats_and_fills_empty_codes() -> None:
    rng = np.random.default_rng(0)
    x_ND = (
        rng.standard_normal((8, 6))[rng.integers(0, 8, 900)] + 0.1 * rng.standard_normal((900, 6))
    ).astype("f4")
    one_KD, code_N = kmeans_torch(x_ND, 16, iterations=15, seed=1, device="cpu")
    two_KD, _ = kmeans_torch(x_ND, 16, iterations=15, seed=1, device="cpu")
    np.testing.assert_array_equal(one_KD, two_KD)
    np.testing.assert_array_equal(code_N, ((x_ND[:, None] - one_KD) ** 2).sum(-1).argmin(1))
    assert len(np.unique(code_N)) == 16
    assert ((x_ND - one_KD[code_N]) ** 2).sum(1).mean() < 0.1
    same_KD, _ = kmeans_torch(np.repeat(x_ND[:2], 20, axis=0), 4, iterations=5, seed=0, device="cpu")
    assert np.isfinite(same_KD).all()


def sets() -> dict[str, np.ndarray]:
    """Vectors of many kinds, clustered, without structure, off the origin, with heavy tails or outliers."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4_000, 32))
    clusters = rng.standard_normal((60, 32))[rng.integers(0, 60, 4_000)] + 0.4 * noise
    long = clusters.copy()
    long[::50] *= 3
    return {
        "clusters": clusters,
        "noise": noise,
        "spectrum": noise / np.arange(1, 33) + 0.7,
        "tails": rng.standard_t(3, (4_000, 32)),
        "outliers": long,
        "few rows": rng.standard_normal((300, 48)) / np.sqrt(np.arange(1, 49)),
    }


@pytest.mark.parametrize("name", list(sets()))
def test_a_progressive_start_is_that_of_faiss(name: str) -> None:
    x_ND = sets()[name].astype(np.float32)
    found: dict[str, list[tuple[float, float]]] = {"torch": [], "faiss": []}
    for seed in range(3):
        ways = {
            "torch": partial(kmeans_torch, device="cpu", init="progressive"),
            "faiss": partial(kmeans_progressive, threads=1),
        }
        for way, fit in ways.items():
            r_ND, full = x_ND, 32.0
            for _ in range(3):
                c_KD, code_N = fit(r_ND, 32, iterations=10, seed=seed)
                r_ND = r_ND - c_KD[code_N]
                share_K = np.bincount(code_N, minlength=32) / len(r_ND) + 1e-12
                full = min(full, float(np.exp(-(share_K * np.log(share_K)).sum())))
            found[way].append((float((r_ND**2).sum()), full))
    error, full = np.median(found["torch"], axis=0) / np.median(found["faiss"], axis=0)
    assert error == pytest.approx(1, abs=0.02)
    assert full == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dims", [1, 2, 24, 384, 512])
def test_axes_grow_to_all_of_them(dims: int) -> None:
    steps = axes_steps(dims)
    assert steps[-1] == dims and len(steps) == min(10, dims)
    assert steps == sorted(steps) and steps[0] >= 1


@pytest.mark.parametrize("init", ["random", "progressive"])
@pytest.mark.parametrize("shape", [(60, 1), (16, 4), (20, 64)])
def test_kmeans_of_odd_shapes(shape: tuple[int, int], init: Any) -> None:
    x_ND = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for vectors_ND in (x_ND, np.ones_like(x_ND)):
        c_KD, code_N = kmeans_torch(vectors_ND, 16, iterations=5, seed=0, device="cpu", init=init)
        assert np.isfinite(c_KD).all() and code_N.shape == (len(x_ND),)


@pytest.mark.gpu
def test_a_progressive_start_on_the_card_repeats() -> None:
    x_ND = sets()["spectrum"].astype(np.float32)
    one, two = (kmeans_torch(x_ND, 64, iterations=5, seed=0, device="cuda", init="progressive") for _ in "ab")
    np.testing.assert_array_equal(one[0], two[0])
    on_cpu, _ = kmeans_torch(x_ND, 64, iterations=5, seed=0, device="cpu", init="progressive")
    error = [((x_ND - c_KD[nearest(x_ND, c_KD)]) ** 2).sum() for c_KD in (one[0], on_cpu)]
    assert error[0] == pytest.approx(error[1], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(256, 256, 256), (2_000, 1_500), (40, 9)])
def test_the_kernel_equals_the_definition(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    from prerank_tools.quantizers.assign_triton import Tiling, nearest_triton

    x_ND, codebooks = hard(dims=100, sizes=sizes)
    x = torch.from_numpy(x_ND).cuda().to(dtype)
    exact_NL = assign_exact(x.float().cpu().numpy(), codebooks)
    levels = assign_levels.put_levels(codebooks, "cuda")
    for tiling in (Tiling(), Tiling(64, 128, 32, 4, 2)):
        nearest = partial(nearest_triton, tiling=tiling)
        np.testing.assert_array_equal(
            gpu.assign_on_device(x, levels, nearest=nearest).cpu().numpy(), exact_NL
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(256, 256, 256), (300, 1, 700, 20), (2_000, 1_500), (40, 9)])
@pytest.mark.parametrize(("dims", "scale"), [(512, 1.0), (104, 1.0), (104, 1e-5), (64, 1.0)])
def test_the_hopper_kernel_equals_the_definition(
    dtype: torch.dtype, sizes: tuple[int, ...], dims: int, scale: float
) -> None:
    from prerank_tools.quantizers import assign_hopper as hopper

    x_ND, codebooks = hard(scale, dims=dims, sizes=sizes)
    x = torch.from_numpy(x_ND).cuda().to(dtype)
    levels = assign_levels.put_levels(codebooks, "cuda")
    if not hopper.fits(x, levels):
        pytest.skip("not a Hopper card")
    exact_NL = assign_exact(x.float().cpu().numpy(), codebooks)
    guessed = hopper.guess_hopper(x, levels).guessed
    wrong_NL = guessed.codes_nL.cpu().numpy() != exact_NL
    rows = np.flatnonzero(wrong_NL.any(axis=1))
    assert (guessed.doubt_n.cpu().numpy()[rows] >> wrong_NL[rows].argmax(axis=1) & 1).all()
    np.testing.assert_array_equal(gpu.assign_on_device(x, levels).cpu().numpy(), exact_NL)


def test_packed_codebooks_hold_every_code_and_bias_where_the_kernel_looks() -> None:
    _, codebooks = hard(dims=104, sizes=(200, 300, 31))
    levels = assign_levels.put_levels(codebooks, "cpu")
    packed = levels.packed
    rng = np.random.default_rng(0)
    chunks_LUC = packed.codes_LX.view(3, packed.size // 128, 2, 128, 8, 8)
    bias_4 = packed.bias.view(-1, 4)
    for level, codebook_KD in enumerate(codebooks):
        for code, dim in zip(
            rng.integers(0, len(codebook_KD), 50), rng.integers(0, codebook_KD.shape[1], 50), strict=True
        ):
            unit, row, piece = code // 128, code % 128, dim % 64 // 8 ^ code % 8
            assert (
                chunks_LUC[level, unit, dim // 64, row, piece, dim % 8] == levels.half_LKD[level, code, dim]
            )
            before = [int(rng.integers(0, len(c_KD))) for c_KD in codebooks[:level]]
            row_4, table_4 = packed.size // 4, packed.size**2 // 4
            starts = [
                row_4 + (level * (level - 1) // 2 + j) * table_4 + k * row_4 for j, k in enumerate(before)
            ]
            column = unit * 32 + row // 16 * 4 + row % 8 // 2, row % 16 // 8 * 2 + row % 2
            found = sum(float(bias_4[start + column[0], column[1]]) for start in starts or [0])
            want = float(levels.norm_LK[level, code])
            want += sum(float(levels.table_LLKK[level, j, k, code]) for j, k in enumerate(before))
            assert found == pytest.approx(want, abs=1e-6)


def test_codebooks_are_laid_out_once_and_again_when_they_change() -> None:
    x_ND, codebooks = hard()
    first = assign_levels.held_levels(codebooks, "cpu")
    assert assign_levels.held_levels([c_KD.copy() for c_KD in codebooks], "cpu") is first
    codebooks[1][3, 5] += 1.0
    assert assign_levels.held_levels(codebooks, "cpu") is not first
    np.testing.assert_array_equal(
        gpu.assign_torch(x_ND, codebooks, device="cpu"), assign_exact(x_ND, codebooks)
    )
