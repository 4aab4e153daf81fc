"""Assignment: the fast path equals the float64 definition, whatever the batch, the threads or the dtype."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank_tools.quantizers import assign_cpu as fast
from prerank_tools.quantizers.assign import assign, assign_beam, assign_exact, decode


def problem(
    rows: int, dims: int, sizes: tuple[int, ...], seed: int = 0
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Vectors around random paths, so that residuals shrink as those of a real codebook do."""
    rng = np.random.default_rng(seed)
    codebooks = [
        (rng.standard_normal((size, dims)) / 2**level).astype(np.float32) for level, size in enumerate(sizes)
    ]
    path = [codebook_KD[rng.integers(0, len(codebook_KD), rows)] for codebook_KD in codebooks]
    x_ND = sum(path) + rng.standard_normal((rows, dims)) * 0.5 ** len(sizes)
    return x_ND.astype(np.float32), codebooks


def rational(x_ND: np.ndarray, codebooks: list[np.ndarray]) -> np.ndarray:
    """The definition without rounding."""
    codes = []
    for x_D in x_ND:
        r_D, row = [Fraction(float(v)) for v in x_D], []
        for codebook_KD in codebooks:
            exact = [[Fraction(float(v)) for v in c_D] for c_D in codebook_KD]
            distance = [sum((r - c) ** 2 for r, c in zip(r_D, c_D, strict=True)) for c_D in exact]
            row.append(distance.index(min(distance)))
            r_D = [r - c for r, c in zip(r_D, exact[row[-1]], strict=True)]
        codes.append(row)
    return np.array(codes, dtype=np.uint16)


def test_the_definition_agrees_with_rational_arithmetic() -> None:
    x_ND, codebooks = problem(60, 5, (7, 4, 3))
    x_ND[:10] = (codebooks[0][0] + codebooks[0][1]) / 2  # close to a tie
    np.testing.assert_array_equal(assign_exact(x_ND, codebooks), rational(x_ND, codebooks))


@pytest.fixture(params=["tiles", "bf16", "float32"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by the matrix unit where there is one, and as CPUs without it or without bf16 make them."""
    if request.param == "tiles" and not fast.have_tiles():
        pytest.skip("no AMX")
    monkeypatch.setattr(fast, "multiplier", lambda: request.param)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(
    ("dims", "sizes"),
    [(32, (256, 256, 256)), (17, (40, 9, 300, 2)), (64, (1,)), (8, (5, 1, 700)), (128, (64,) * 6)],
)
def test_the_fast_path_equals_the_definition(dims: int, sizes: tuple[int, ...]) -> None:
    x_ND, codebooks = problem(3_001, dims, sizes)
    np.testing.assert_array_equal(fast.assign_cpu(x_ND, codebooks), assign_exact(x_ND, codebooks))


@pytest.mark.usefixtures("products")
def test_wide_levels_go_by_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, codebooks = problem(2_000, 32, (100, 100, 100))
    monkeypatch.setattr(fast, "TABLE_BYTES", 0)
    np.testing.assert_array_equal(fast.assign_cpu(x_ND, codebooks), assign_exact(x_ND, codebooks))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("scale", [1e18, 1e25])
def test_squares_that_single_precision_does_not_hold(scale: float) -> None:
    x_ND, codebooks = problem(500, 24, (50, 50))
    x_ND[::3] *= np.float32(scale)
    codebooks[0][::2] *= np.float32(scale)
    np.testing.assert_array_equal(fast.assign_cpu(x_ND, codebooks), assign_exact(x_ND, codebooks))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_neither_scale_nor_a_common_mean_matters(scale: float, shift: float) -> None:
    x_ND, codebooks = problem(1_000, 24, (50, 50))
    moved = [codebooks[0] + np.float32(shift), codebooks[1]]
    x_ND = (x_ND + np.float32(shift)) * np.float32(scale)
    moved = [codebook_KD * np.float32(scale) for codebook_KD in moved]
    np.testing.assert_array_equal(fast.assign_cpu(x_ND, moved), assign_exact(x_ND, moved))


def test_ties_go_to_the_lowest_code() -> None:
    codebook_KD = np.array([[9, 9], [1, 0], [-1, 0], [1, 0], [0, 1]], dtype=np.float32)
    x_ND = np.array([[0, 0], [1, 0], [0, -3], [5, 5]], dtype=np.float32)
    for codes_NL in (assign_exact(x_ND, [codebook_KD]), fast.assign_cpu(x_ND, [codebook_KD])):
        assert codes_NL[:, 0].tolist() == [1, 1, 1, 0]


@pytest.mark.usefixtures("products")
def test_near_ties_are_settled_as_the_definition_does() -> None:
    rng = np.random.default_rng(1)
    _, codebooks = problem(1, 48, (256, 256), seed=5)
    a_N, b_N = rng.integers(0, 256, (2, 3_000))
    halfway_ND = (codebooks[0][a_N].astype(np.float64) + codebooks[0][b_N]) / 2
    x_ND = halfway_ND.astype(np.float32)
    np.testing.assert_array_equal(fast.assign_cpu(x_ND, codebooks), assign_exact(x_ND, codebooks))


@pytest.mark.parametrize("dtype", [np.int8, np.float16])
def test_narrow_inputs_are_taken_as_they_are(dtype: type) -> None:
    rng = np.random.default_rng(0)
    x_ND = rng.integers(-127, 128, (2_000, 32)).astype(dtype)
    codebooks = [rng.integers(-60, 60, (64, 32)).astype(np.float32) for _ in range(3)]
    codes_NL = assign_exact(x_ND, codebooks)
    np.testing.assert_array_equal(fast.assign_cpu(x_ND, codebooks), codes_NL)
    np.testing.assert_array_equal(assign_exact(x_ND.astype(np.float32), codebooks), codes_NL)


def test_batches_threads_order_and_memory_layout_change_nothing() -> None:
    x_ND, codebooks = problem(5_000, 40, (128, 128, 128))
    whole_NL = fast.assign_cpu(x_ND, codebooks, threads=2)
    np.testing.assert_array_equal(fast.assign_cpu(x_ND, codebooks, threads=1), whole_NL)
    order_N = np.random.default_rng(0).permutation(len(x_ND))
    np.testing.assert_array_equal(fast.assign_cpu(x_ND[order_N], codebooks), whole_NL[order_N])
    for step in (1, 7, 1_000):
        rows = x_ND[: 3 * step]
        pieces = [fast.assign_cpu(rows[at : at + step], codebooks) for at in range(0, len(rows), step)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole_NL[: 3 * step])
    np.testing.assert_array_equal(fast.assign_cpu(np.asfortranarray(x_ND), codebooks), whole_NL)


def test_torch_threads_are_left_as_they_were() -> None:
    torch.set_num_threads(2)
    fast.assign_cpu(*problem(500, 8, (16, 16)))
    assert torch.get_num_threads() == 2


def test_large_work_takes_the_fast_path_with_equal_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, codebooks = problem(900, 16, (32, 32))
    small_NL = assign(x_ND, codebooks)
    monkeypatch.setattr("prerank_tools.quantizers.assign.SMALL_WORK", 0)
    np.testing.assert_array_equal(assign(x_ND, codebooks), small_NL)
    assert assign(x_ND[:0], codebooks).shape == (0, 2)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 12),
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(0, 999),
)
def test_any_shape(rows: int, dims: int, sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Small integers make exact ties common.
    x_ND = rng.integers(-2, 3, (rows, dims)).astype(np.float32)
    codebooks = [rng.integers(-2, 3, (size, dims)).astype(np.float32) for size in sizes]
    np.testing.assert_array_equal(fast.assign_cpu(x_ND, codebooks), assign_exact(x_ND, codebooks))


def test_beam_one_is_greedy_and_a_full_beam_is_the_best_path() -> None:
    x_ND, codebooks = problem(50, 6, (5, 4, 3))
    np.testing.assert_array_equal(assign_beam(x_ND, codebooks, beam=1), assign_exact(x_ND, codebooks))
    paths_PL = np.stack(np.meshgrid(*[np.arange(len(c)) for c in codebooks], indexing="ij"), -1).reshape(
        -1, 3
    )
    sums_PD = decode(paths_PL, codebooks).astype(np.float64)
    best_N = ((x_ND[:, None].astype(np.float64) - sums_PD) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(assign_beam(x_ND, codebooks, beam=60), paths_PL[best_N])
