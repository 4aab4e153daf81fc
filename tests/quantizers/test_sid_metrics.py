"""SID metrics against values counted by hand, scikit-learn and brute force."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from prerank_tools.quantizers.neighbours import nearest_rows, neighbour_recall, sample_rows
from prerank_tools.quantizers.sid_keys import pack_codes
from prerank_tools.quantizers.sid_meaning import behavior_lift, normalised_mutual_information, prefix_meaning
from prerank_tools.quantizers.sid_metrics import Reconstruction, SidCounts, gini

CODES = np.array([[0, 0], [0, 0], [0, 1], [1, 1], [1, 1], [1, 1], [0, 2], [3, 0]])


def use_of(codes: np.ndarray, sizes: tuple[int, ...]):  # type: ignore[no-untyped-def]
    counts = SidCounts(sizes)
    counts.update(codes)
    return counts.finalize()


def test_counts_by_hand() -> None:
    use = use_of(CODES, (4, 4))
    assert (use.items, use.sids, use.largest_sid) == (8, 5, 3)
    assert use.collision_rate == 3 / 8
    assert use.exclusive_items == 3 / 8 and use.exclusive_sids == 3 / 5
    first = use.levels[0]  # 4, 3, 0, 1 of 8
    assert (first.used, first.dead, first.prefixes, first.largest_share) == (3, 1, 3, 0.5)
    entropy = -(0.5 * np.log(0.5) + 3 / 8 * np.log(3 / 8) + 1 / 8 * np.log(1 / 8))
    assert first.perplexity == pytest.approx(np.exp(entropy))
    assert first.entropy == pytest.approx(entropy / np.log(4))
    assert use.levels[1].prefixes == 5


def test_batches_add_up_whatever_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prerank_tools.quantizers.sid_metrics.BUFFER", 3)
    counts = SidCounts((4, 4))
    for start in range(0, 8, 3):
        counts.update(CODES[start : start + 3])
    assert counts.finalize() == use_of(CODES, (4, 4))


def test_gini() -> None:
    assert gini(np.array([5, 5, 5])) == pytest.approx(0)
    assert gini(np.array([1, 3])) == pytest.approx(0.25)
    assert gini(np.array([0] * 99 + [1])) == pytest.approx(0.99)


def test_an_empty_catalogue_has_no_numbers_to_divide() -> None:
    use = use_of(np.zeros((0, 2), dtype=int), (4, 4))
    assert (use.items, use.sids, use.gini) == (0, 0, 0.0)


def test_a_million_rows_take_seconds() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, size=(1_000_000, 3), dtype=np.uint16)
    start = time.perf_counter()
    use = use_of(codes, (256,) * 3)
    assert time.perf_counter() - start < 10
    # A random hash: 1 - M (1 - (1 - 1/M)^N) / N
    cells = 256**3
    assert use.collision_rate == pytest.approx(1 - cells * (1 - (1 - 1 / cells) ** 1e6) / 1e6, abs=5e-4)


def test_reconstruction_by_hand() -> None:
    error = Reconstruction()
    error.update(np.array([[3.0, 4.0]]), np.array([[3.0, 0.0]]))
    error.update(np.array([[0.0, 5.0]]), np.array([[0.0, 5.0]]))
    assert error.finalize() == {"relative_error": 16 / 50, "cosine": pytest.approx((0.6 + 1) / 2)}


def test_nearest_rows_equal_brute_force_in_any_blocks() -> None:
    x = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    rows = sample_rows(200, 20)
    d = ((x[rows][:, None] - x[None]) ** 2).sum(-1)
    d[np.arange(20), rows] = np.inf
    for step in (7, 64, 200):
        blocks = [x[start : start + step] for start in range(0, 200, step)]
        distance, index = nearest_rows(x[rows], blocks, k=5, skip_Q=rows)
        np.testing.assert_array_equal(index, np.argsort(d, axis=1)[:, :5])
        np.testing.assert_allclose(distance, np.sort(d, axis=1)[:, :5], rtol=1e-4, atol=1e-4)


def recall_of(x: np.ndarray, decoded: np.ndarray, codes: np.ndarray, k: int) -> np.ndarray:
    key = pack_codes(codes, (16,) * codes.shape[1])
    _, truth = nearest_rows(x, [x], k=k, skip_Q=np.arange(len(x)))
    key_M, first, count = np.unique(key, return_index=True, return_counts=True)
    return neighbour_recall(
        key[truth], decoded, key, key_M=key_M, count_M=count, blocks=[decoded[first][:3], decoded[first][3:]]
    )


def test_lossless_codes_recall_everything() -> None:
    x = np.random.default_rng(1).normal(size=(60, 4)).astype(np.float32)
    codes = np.stack([np.arange(60) // 16, np.arange(60) % 16], axis=1)
    np.testing.assert_allclose(recall_of(x, x, codes, 10), 1)


def test_items_of_one_sid_count_by_chance() -> None:
    x = np.arange(5, dtype=np.float32)[:, None]
    codes = np.zeros((5, 1), dtype=int)  # all on one SID: each of the 4 others is drawn with chance 2/4
    np.testing.assert_allclose(recall_of(x, np.zeros((5, 1), np.float32), codes, 2), 0.5)


def test_recall_equals_a_random_tie_break_on_average() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(80, 3)).astype(np.float32)
    codes = rng.integers(0, 4, size=(80, 2))
    decoded = codes @ rng.normal(size=(2, 3)).astype(np.float32)
    expected = np.zeros(80)
    _, truth = nearest_rows(x, [x], k=5, skip_Q=np.arange(80))
    for _ in range(400):
        d = np.linalg.norm(decoded[:, None] - decoded[None], axis=2).round(4)
        d += rng.random((80, 80)) * 1e-6
        np.fill_diagonal(d, np.inf)
        near = np.argsort(d, axis=1)[:, :5]
        expected += (truth[:, :, None] == near[:, None, :]).sum((1, 2)) / 5 / 400
    assert np.abs(recall_of(x, decoded, codes, 5) - expected).mean() < 0.01


def test_prefix_purity_and_nmi() -> None:
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    category = np.array(["dress", "dress", "shoe", "dress"])
    top, full = prefix_meaning(codes, category, sizes=(2, 2))
    assert (top.prefixes, top.purity) == (2, 0.75)
    assert (full.prefixes, full.purity, full.purity_by_chance) == (4, 1.0, 1.0)


def test_nmi_equals_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    prefix, category = rng.integers(0, 9, 500), rng.integers(0, 5, 500)
    prefix[category == 2] = 1
    assert normalised_mutual_information(prefix, category) == pytest.approx(
        normalized_mutual_info_score(category, prefix)
    )


def test_lift_of_items_bought_together() -> None:
    codes = np.array([[0, 0], [0, 0], [1, 0], [1, 1]])
    # Pairs (0, 1) and (2, 3); every item has weight 1/4. Two different items share level 1 with chance
    # (1/4 + 1/4 - 1/4) / (1 - 1/4) = 1/3.
    top, full = behavior_lift(codes, np.array([0, 2, 1]), np.array([1, 3, 1]), sizes=(2, 2))
    assert (top.together, top.chance, top.lift) == (1.0, pytest.approx(1 / 3), pytest.approx(3))
    # Depth 2: only 0 and 1 share all codes; chance (1/4 + 1/16 + 1/16 - 1/4) / (3/4) = 1/6.
    assert (full.together, full.chance) == (0.5, pytest.approx(1 / 6))


def test_random_pairs_have_lift_one() -> None:
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 4, size=(500, 2))
    left, right = rng.integers(0, 500, 200_000), rng.integers(0, 500, 200_000)
    assert behavior_lift(codes, left, right, sizes=(4, 4))[0].lift == pytest.approx(1, abs=0.02)
