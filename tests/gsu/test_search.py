"""Exact top-K: every back end gives the bits of a float64 oracle, also where bf16 sees only ties."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank_tools.gsu import search_numba
from prerank_tools.gsu.cosine import exact_cosines, inverse_norms
from prerank_tools.gsu.search import Groups, TopK, topk
from prerank_tools.gsu.simtier import PAD_SIM, simtier

BACKENDS = ["numba", "faiss"]


@pytest.fixture(params=["all cosines", "torch", "tiles"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cosine in float64; shortlists from products by `torch.mm`; from those of the matrix unit."""
    if request.param == "tiles" and not search_numba.have_tiles():
        pytest.skip("no AMX")
    monkeypatch.setattr(search_numba, "have_tiles", lambda: request.param == "tiles")
    monkeypatch.setattr(search_numba, "SHORT", 10**6 if request.param == "all cosines" else 0)


def one_user(history: int, candidates: int) -> Groups:
    """Rows 0 .. history-1 are the past, the next ones the candidates."""
    return Groups(
        np.arange(history),
        np.array([0, history]),
        np.arange(history, history + candidates),
        np.array([0, candidates]),
        np.full(candidates, history),
    )


def random_groups(
    rng: np.random.Generator, rows: int, *, users: int = 4, longest: int = 700, most: int = 12
) -> Groups:
    history, asked = rng.integers(0, longest, users), rng.integers(0, most, users)
    visible = np.concatenate([rng.integers(0, n + 1, c) for n, c in zip(history, asked, strict=True)])
    return Groups(
        rng.integers(-1, rows, history.sum()),
        np.r_[0, history.cumsum()],
        rng.integers(-1, rows, asked.sum()),
        np.r_[0, asked.cumsum()],
        visible,
    )


def assert_same(found: TopK, expected: TopK) -> None:
    for name in ("positions_MK", "sims_MK", "n_valid_M", "recent_MS"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("width", [8, 40, 128])
def test_back_ends_give_the_oracle(backend: str, dtype: type, width: int) -> None:
    rng = np.random.default_rng(width)
    table = (rng.normal(size=(300, width)) * (40 if dtype is np.int8 else 1)).astype(dtype)
    table[:5] = 0
    groups = random_groups(rng, len(table))
    assert_same(topk(table, groups, k=20, backend=backend), topk(table, groups, k=20, backend="numpy"))


def test_oracle_is_the_true_cosine() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 50)).astype(np.float32)
    dot, aa, bb = (
        sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(p, q, strict=True))
        for p, q in ((a, b), (a, a), (b, b))
    )
    assert exact_cosines(a[None], b[None])[0] == pytest.approx(float(dot) / math.sqrt(aa * bb), abs=1e-15)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("backend", BACKENDS)
def test_near_ties_that_bf16_cannot_tell_apart(backend: str) -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(size=64)
    table = (base + rng.normal(size=(900, 64)) * 1e-4).astype(np.float32)
    groups = one_user(880, 20)
    assert_same(topk(table, groups, k=50, backend=backend), topk(table, groups, k=50, backend="numpy"))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_near_ties_than_a_shortlist_holds(backend: str) -> None:
    rng = np.random.default_rng(3)
    table = (np.ones(16) + rng.normal(size=(3010, 16)) * 1e-5).astype(np.float32)
    groups = one_user(3000, 10)
    assert search_numba.CAPACITY < 3000
    assert_same(topk(table, groups, k=10, backend=backend), topk(table, groups, k=10, backend="numpy"))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-42])
def test_lengths_that_single_precision_cannot_square(scale: float) -> None:
    rng = np.random.default_rng(4)
    table = rng.normal(size=(330, 32))
    table[::3] *= scale
    groups = one_user(320, 10)
    found = topk(table.astype(np.float32), groups, k=30)
    assert_same(found, topk(table.astype(np.float32), groups, k=30, backend="numpy"))
    assert (found.n_valid_M > 200).all()


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_later_behaviour(backend: str) -> None:
    table = np.array([[1, 0], [1, 1], [2, 0]], dtype=np.float32)
    rows = np.array([0, 1, 0, 1, 2] * 80)
    groups = Groups(
        rows, np.array([0, 400]), np.full(5, 0), np.array([0, 5]), np.array([400, 399, 398, 3, 0])
    )
    found = topk(table, groups, k=3, recent=0, backend=backend)
    assert found.positions_MK.tolist() == [
        [399, 397, 395],
        [397, 395, 394],
        [397, 395, 394],
        [2, 0, 1],
        [-1, -1, -1],
    ]


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("history", [3, 400])
@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_and_exactly_orthogonal_behaviours_never_win(backend: str, history: int) -> None:
    table = np.array([[1, 0], [0, 1], [-1, 0], [0, 0]], dtype=np.float32)
    rows = np.resize([1, -1, 2, 3], history)
    groups = Groups(
        rows, np.array([0, history]), np.zeros(5, dtype=int), np.array([0, 5]), np.full(5, history)
    )
    found = topk(table, groups, k=200, backend=backend)
    opposite = np.flatnonzero(rows == 2)[::-1]
    assert found.positions_MK[0, : len(opposite)].tolist() == opposite.tolist()
    assert (found.positions_MK[0, len(opposite) :] == -1).all()
    assert found.sims_MK[0, 0] == -1 and found.sims_MK[0, -1] == PAD_SIM
    assert found.n_valid_M.tolist() == [len(opposite)] * 5
    assert set(found.recent_MS[0]) <= {np.float32(-1), PAD_SIM}


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_user_whose_past_is_unlike_every_candidate(backend: str) -> None:
    rng = np.random.default_rng(5)
    history = rng.normal(size=(600, 24)) * 0.1 + 1
    candidates = rng.normal(size=(8, 24)) * 0.1 - 1
    table = np.concatenate([history, candidates]).astype(np.float32)
    assert_same(
        topk(table, one_user(600, 8), backend=backend), topk(table, one_user(600, 8), backend="numpy")
    )


@pytest.mark.usefixtures("products")
def test_one_hot_vectors_are_mostly_exact_zeros() -> None:
    table = np.eye(20, dtype=np.int8)
    rng = np.random.default_rng(6)
    groups = Groups(
        rng.integers(0, 20, 2000), np.array([0, 2000]), np.arange(20), np.array([0, 20]), np.full(20, 2000)
    )
    assert_same(topk(table, groups, k=150), topk(table, groups, k=150, backend="numpy"))


def test_not_finite_vectors_are_missing() -> None:
    table = np.array([[1, 0], [np.nan, 1], [np.inf, 1], [1, 1]], dtype=np.float32)
    groups = Groups(
        np.array([1, 2, 3]), np.array([0, 3]), np.array([0, 1]), np.array([0, 2]), np.array([3, 3])
    )
    found = topk(table, groups, k=2)
    assert found.positions_MK.tolist() == [[2, -1], [-1, -1]] and found.n_valid_M.tolist() == [1, 0]
    assert_same(found, topk(table, groups, k=2, backend="numpy"))


@pytest.mark.usefixtures("products")
def test_chunks_blocks_and_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    table = rng.normal(size=(400, 32)).astype(np.float32)
    groups = random_groups(rng, 400, users=3, longest=3000, most=40)
    whole = topk(table, groups, threads=2)
    assert_same(whole, topk(table, groups, backend="numpy"))
    for name, size in (("CHUNK", 256), ("BLOCK", 7), ("CAPACITY", 128)):
        monkeypatch.setattr(search_numba, name, size)
        assert_same(topk(table, groups, threads=1), whole)


@pytest.mark.usefixtures("products")
def test_similarity_that_rises_along_a_long_history(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every chunk beats the one before it, so that shortlists fill up and are cut again and again.
    monkeypatch.setattr(search_numba, "CHUNK", 512)
    angle = np.linspace(1.5, 0.1, 4000)
    table = np.concatenate([np.stack([np.cos(angle), np.sin(angle)], 1), [[1, 0]] * 5]).astype(np.float32)
    assert_same(topk(table, one_user(4000, 5)), topk(table, one_user(4000, 5), backend="numpy"))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 255), levels=st.integers(1, 6))
def test_coarse_values_full_of_ties(seed: int, k: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.integers(-levels, levels + 1, (60, 4)).astype(np.int8)
    groups = random_groups(rng, 60, users=2, longest=600, most=8)
    found, expected = topk(table, groups, k=k), topk(table, groups, k=k, backend="numpy")
    assert_same(found, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_numba, "SHORT", 0)
        assert_same(topk(table, groups, k=k), expected)
    assert (simtier(found.sims_MK).sum(1) == np.minimum(k, found.n_valid_M)).all()


def test_the_histogram_does_not_depend_on_the_order_of_the_history() -> None:
    rng = np.random.default_rng(8)
    table = rng.normal(size=(520, 32)).astype(np.float16)
    groups = one_user(500, 20)
    shuffled = Groups(
        rng.permutation(500),
        *(
            getattr(groups, n)
            for n in ("history_offsets", "candidate_rows_M", "candidate_offsets", "visible_M")
        ),
    )
    np.testing.assert_array_equal(
        simtier(topk(table, groups).sims_MK), simtier(topk(table, shuffled).sims_MK)
    )


def test_compiled_tiers_are_the_tiers() -> None:
    tenths = np.arange(-10, 11, dtype=np.float32) / 10
    around = [tenths, np.nextafter(tenths, np.float32(2)), np.nextafter(tenths, np.float32(-2)), [PAD_SIM]]
    sims = np.stack([np.concatenate(around), np.random.default_rng(9).uniform(-1.2, 1.2, 64)])
    np.testing.assert_array_equal(search_numba.count_tiers(sims), simtier(sims))


def test_no_candidates_and_no_history() -> None:
    table = np.ones((1, 16), dtype=np.float32)
    nothing = Groups(np.empty(0, int), np.array([0]), np.empty(0, int), np.array([0]), np.empty(0, int))
    assert topk(table, nothing).positions_MK.shape == (0, 50)
    cold = Groups(np.empty(0, int), np.array([0, 0]), np.zeros(4, int), np.array([0, 4]), np.zeros(4, int))
    assert (topk(table, cold).positions_MK == -1).all()
    assert inverse_norms(np.zeros((1, 3))).tolist() == [0.0]
