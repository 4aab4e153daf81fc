"""SimTier: the golden bins of MUSE's code, the paper's uniform tiers, the torch layers that agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prerank_tools.gsu.layers import SimTier, recent_tier_counts, tier_counts
from prerank_tools.gsu.simtier import PAD_SIM, simtier, tier_of, uniform_simtier, uniform_tier_of

GOLDEN = [-1, -0.95, -0.05, 0, 0.05, 0.1, 0.3, 0.7, 0.95, 1.0]


def test_golden_bins() -> None:
    assert tier_of(np.array(GOLDEN)).tolist() == [0, 1, 10, 10, 11, 11, 13, 17, 20, 20]


def test_golden_counts() -> None:
    counts = simtier(np.array([GOLDEN]))[0]
    assert counts.dtype == np.uint8
    assert {tier: int(n) for tier, n in enumerate(counts) if n} == {
        0: 1,
        1: 1,
        10: 2,
        11: 2,
        13: 1,
        17: 1,
        20: 2,
    }


def test_a_cosine_above_one_by_rounding_has_a_tier_of_its_own() -> None:
    assert tier_of(np.nextafter(np.float32(1), np.float32(2))) == 21


def test_padding_is_not_counted() -> None:
    assert simtier(np.array([[0.5, PAD_SIM, PAD_SIM]])).sum() == 1
    assert uniform_simtier(np.array([[0.5, PAD_SIM, PAD_SIM]]), 10).sum() == 1


@pytest.mark.parametrize(
    ("tiers", "expected"), [(10, [0, 0, 4, 5, 5, 5, 6, 8, 9, 9]), (20, [0, 0, 9, 10, 10, 11, 13, 17, 19, 19])]
)
def test_golden_uniform_tiers(tiers: int, expected: list[int]) -> None:
    assert uniform_tier_of(np.array(GOLDEN), tiers).tolist() == expected


def test_histogram_does_not_depend_on_the_order_of_the_history() -> None:
    sims = np.random.default_rng(0).uniform(-1, 1, (20, 50)).astype(np.float32)
    assert (simtier(sims) == simtier(sims[:, ::-1])).all()
    assert (simtier(sims).sum(1) == 50).all()


def test_torch_counts_are_the_numpy_counts() -> None:
    tenths = np.arange(-10, 11, dtype=np.float32) / 10
    around = np.concatenate(
        [tenths, np.nextafter(tenths, np.float32(2)), np.nextafter(tenths, np.float32(-2)), [PAD_SIM]]
    )
    assert (
        tier_counts(torch.from_numpy(around)[None]).numpy().astype(np.uint8).tolist()
        == simtier(around[None]).tolist()
    )


def test_layer_is_log_of_count_times_a_learnable_weight() -> None:
    layer = SimTier()
    assert ((layer.weight >= 0) & (layer.weight < 1)).all()
    with torch.no_grad():
        layer.weight.copy_(torch.arange(22.0))
    counts = torch.zeros(1, 22, dtype=torch.uint8)
    counts[0, 3] = 4
    features = layer(counts)
    assert features[0, 3].item() == pytest.approx(3 * np.log(5))
    features.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad[3].item() == pytest.approx(np.log(5))


def test_recent_histogram_leaves_out_padding_and_zero_vectors_and_gives_them_no_gradient() -> None:
    candidate = torch.tensor([[2.0, 0.0]])
    behaviors = torch.tensor(
        [[[3.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 5.0], [1.0, 0.0]]], requires_grad=True
    )
    counts = recent_tier_counts(candidate, behaviors, torch.tensor([[True, True, True, True, False]]))
    assert {tier: int(n) for tier, n in enumerate(counts[0]) if n} == {18: 1, 20: 1}
    assert not counts.requires_grad
