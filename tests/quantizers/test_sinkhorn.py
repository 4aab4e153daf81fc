"""Log-domain Sinkhorn: the golden balance, the marginals, and no NaN where public code has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prerank_tools.quantizers.sinkhorn import sinkhorn, sinkhorn_forge, sinkhorn_lcrec

CODES = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=np.float64)


def eight_points_at_code_0() -> torch.Tensor:
    """Squared distances of 8 points near the origin to 4 codes (the golden case of the paper notes)."""
    x_BD = np.random.default_rng(0).normal(size=(8, 2)) * 0.05
    return torch.from_numpy(((x_BD[:, None] - CODES[None]) ** 2).sum(-1))


def counts(plan_BK: torch.Tensor) -> list[int]:
    return np.bincount(plan_BK.argmax(dim=-1).numpy(), minlength=4).tolist()


def test_lcrec_form_is_far_more_even_than_argmin() -> None:
    d_BK = eight_points_at_code_0()
    assert counts(-d_BK) == [8, 0, 0, 0]
    assert counts(sinkhorn_lcrec(d_BK)) == [3, 2, 2, 1]


def test_lcrec_form_equals_the_linear_domain_where_that_is_finite() -> None:
    d_BK = eight_points_at_code_0().numpy()
    middle = (d_BK.max() + d_BK.min()) / 2
    plan = np.exp(-((d_BK - middle) / (d_BK.max() - middle + 1e-5)) / 0.05)
    plan /= plan.sum()
    for _ in range(50):
        plan = plan / plan.sum(1, keepdims=True) / 8
        plan = plan / plan.sum(0, keepdims=True) / 4
    ours = sinkhorn_lcrec(torch.from_numpy(d_BK), eps=0.05).exp().numpy()
    np.testing.assert_allclose(ours, plan, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("eps", [1e-3, 1e-4])
def test_no_nan_where_exponentials_underflow(dtype: torch.dtype, eps: float) -> None:
    d_BK = torch.from_numpy(np.random.default_rng(1).random((64, 16)) * 100).to(dtype)
    plan_BK = sinkhorn_lcrec(d_BK, eps=eps)
    assert torch.isfinite(plan_BK).all()
    assert len(plan_BK.argmax(dim=1).unique()) == 16  # the linear form gives code 0 to all 64


def test_marginals() -> None:
    d_BK = torch.from_numpy(np.random.default_rng(2).random((12, 4)))
    rows_last = sinkhorn(d_BK, eps=0.5, iterations=200, rows_first=False).exp()
    torch.testing.assert_close(rows_last.sum(1), torch.full((12,), 1 / 12, dtype=torch.float64))
    torch.testing.assert_close(rows_last.sum(0), torch.full((4,), 1 / 4, dtype=torch.float64))


def test_forge_form_balances_a_batch_and_ignores_scale() -> None:
    d_BK = eight_points_at_code_0()
    balanced = counts(sinkhorn_forge(d_BK))
    assert max(balanced) < 8 and sum(count > 0 for count in balanced) >= 2
    assert counts(sinkhorn_forge(1000 * d_BK + 3)) == balanced


def test_a_batch_of_groups_gives_each_group_its_own_plan() -> None:
    d_SBK = torch.from_numpy(np.random.default_rng(3).random((5, 6, 4)))
    together = sinkhorn_lcrec(d_SBK)
    for group in range(5):
        torch.testing.assert_close(together[group], sinkhorn_lcrec(d_SBK[group]))
