"""Fusion: shapes, unit norm, and a missing modality that can neither leak nor be ignored."""

from __future__ import annotations

import math

import pytest
import torch

from prerank_tools.encoders.fusion import FusionConfig, build_fusion, concat_unit

KINDS = ("concat", "gated", "cross_modal", "residual")


def fusion(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_fusion(FusionConfig(kind=kind, text_dim=6, image_dim=4, dim=8, hidden=16, heads=2)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_unit_and_of_the_configured_width(kind: str) -> None:
    both = torch.ones(5, dtype=torch.bool)
    x_BD = fusion(kind)(torch.randn(5, 6), torch.randn(5, 4), both, both)
    assert x_BD.shape == (5, 8)
    torch.testing.assert_close(x_BD.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_vector_is_never_read(kind: str) -> None:
    module = fusion(kind)
    text_BT, here, gone = torch.randn(3, 6), torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    with_nan = module(text_BT, torch.full((3, 4), math.nan), here, gone)
    with_ones = module(text_BT, torch.ones(3, 4), here, gone)
    torch.testing.assert_close(with_nan, with_ones)
    assert not torch.allclose(with_ones, module(text_BT, torch.ones(3, 4), here, here))


@pytest.mark.parametrize("kind", KINDS)
def test_the_placeholder_learns_and_the_absent_vector_gets_no_gradient(kind: str) -> None:
    module = fusion(kind)
    image_BI = torch.randn(3, 4, requires_grad=True)
    has_image_B = torch.tensor([True, False, True])
    x_BD = module(torch.randn(3, 6), image_BI, torch.ones(3, dtype=torch.bool), has_image_B)
    (x_BD * torch.randn(3, 8)).sum().backward()
    assert module.no_image_I.grad is not None and module.no_image_I.grad.abs().sum() > 0
    assert image_BI.grad is not None and image_BI.grad[1].abs().sum() == 0
    assert image_BI.grad[0].abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours(kind: str) -> None:
    module, text_BT, image_BI = fusion(kind), torch.randn(4, 6), torch.randn(4, 4)
    has_B = torch.tensor([True, False, True, True])
    whole = module(text_BT, image_BI, ~has_B, has_B)
    alone = module(text_BT[1:2], image_BI[1:2], ~has_B[1:2], has_B[1:2])
    torch.testing.assert_close(whole[1:2], alone)


def test_concat_cosine_is_the_mean_of_the_modalities_cosines() -> None:
    text_BT = torch.tensor([[3.0, 0.0], [0.0, 5.0]])  # cosine 0
    image_BI = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])  # cosine 1
    both = torch.ones(2, dtype=torch.bool)
    x_BD = concat_unit(text_BT, image_BI, both, both)
    assert (x_BD[0] @ x_BD[1]).item() == pytest.approx(0.5)


def test_concat_without_an_image_is_the_text_alone() -> None:
    x_BD = concat_unit(
        torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.tensor([True]), torch.tensor([False])
    )
    torch.testing.assert_close(x_BD, torch.tensor([[0.6, 0.8, 0.0, 0.0]]))


def test_concat_of_one_modality_is_a_linear_head() -> None:
    module = build_fusion(FusionConfig(kind="concat", text_dim=6, image_dim=0, dim=8)).eval()
    text_BT, here = torch.nn.functional.normalize(torch.randn(2, 6), dim=-1), torch.ones(2, dtype=torch.bool)
    expected = torch.nn.functional.normalize(module.project(text_BT), dim=-1)
    torch.testing.assert_close(module(text_BT, torch.empty(2, 0), here, ~here), expected)
