"""Whole items and their neighbours: the frozen space, and the term that carries it into the encoder."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from prerank_tools.encoders.neighbours import (
    NeighbourConfig,
    NeighbourTerm,
    nearest_pairs,
    neighbour_space,
    principal,
    ridge,
)

CONFIG = NeighbourConfig(dims=16)


def catalogue(seed: int = 0, items: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(text, image, kind): the picture shows the kind, the text says it dimly and a colour loudly."""
    dice = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=dice)

    kind = torch.randint(0, 12, (items,), generator=dice)
    colour = torch.randint(0, 7, (items,), generator=dice)
    text = 0.8 * noise(12, 16)[kind] + 1.5 * noise(7, 16)[colour] + noise(items, 16)
    image = noise(12, 24)[kind] + 0.5 * noise(7, 24)[colour] + 1.5 * noise(items, 24)
    return text, image, kind


def same_kind(x_ND: torch.Tensor, kind_N: torch.Tensor) -> float:
    x_ND = normalize(x_ND, dim=1)
    cosine = x_ND @ x_ND.T
    cosine.fill_diagonal_(-2)
    return float((kind_N[cosine.topk(10).indices] == kind_N[:, None]).float().mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_where_both_side_by_side_lose_to_the_picture_the_space_wins(seed: int) -> None:
    text, image, kind = catalogue(seed)
    both = torch.cat([normalize(text, dim=1), normalize(image, dim=1)], dim=1)
    picture = same_kind(image, kind)
    assert max(same_kind(text, kind), same_kind(both, kind)) < picture
    assert same_kind(neighbour_space(text, image, CONFIG), kind) > picture + 0.05


def test_the_space_does_not_know_the_order_of_the_items() -> None:
    text, image, _ = catalogue(items=60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    z_NE, y_NE = neighbour_space(text, image, CONFIG), neighbour_space(text[order], image[order], CONFIG)
    torch.testing.assert_close(z_NE @ z_NE[:1].T, (y_NE @ y_NE[order == 0].T)[order.argsort()])


def test_principal_components_keep_the_largest_directions() -> None:
    x_ND = torch.randn(500, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 9, 1, 8, 1])
    kept = normalize(x_ND[:, [1, 3]].double(), dim=1)
    y_NE = principal(x_ND, 2)
    assert ((y_NE @ y_NE.T) - (kept @ kept.T)).abs().mean() < 0.1  # unrelated ones: 0.5
    assert principal(x_ND, 99).shape == (500, 5)


def test_a_text_that_says_nothing_is_expected_near_the_mean() -> None:
    dice = torch.Generator().manual_seed(0)
    said, unsaid, image = (torch.randn(400, 4, generator=dice).double() for _ in range(3))
    told = ridge(torch.cat([said, image], 1), image)
    untold = ridge(torch.cat([said, unsaid], 1), image)
    assert told.norm(dim=1).mean() > 5 * untold.norm(dim=1).mean()


def test_nearest_pairs_leave_out_the_item_itself() -> None:
    z = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    assert [x.tolist() for x in nearest_pairs(z, 1)] == [[0, 1, 2, 3], [1, 0, 3, 2]]
    assert len(nearest_pairs(z, 9)[0]) == 12


def test_the_term_by_hand() -> None:
    """Three items: the frozen space wants 1 : e between the two others, the encoder says 1 : 1."""
    term = NeighbourTerm(weight=2.0, temperature=1.0)
    z_BE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x_BD = torch.eye(3)
    p = math.e / (1 + math.e)
    entropy_of_even = math.log(2)
    expected = 2.0 * (p + (1 - p)) * entropy_of_even
    assert term(x_BD, z_BE).item() == pytest.approx(expected, abs=1e-6)
    close = normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.0, 1.0]]), dim=1)
    assert term(close[:, :2], z_BE).item() != pytest.approx(expected, abs=1e-3)


def test_an_item_without_a_place_neither_asks_nor_answers() -> None:
    term = NeighbourTerm()
    x_BD = normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), dim=1).requires_grad_()
    z_BE = normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    three = term(x_BD[:3], z_BE[:3])
    four = term(x_BD, torch.cat([z_BE[:3], torch.zeros(1, 5)]))
    assert four.item() == pytest.approx(three.item() * 3 / 4)
    four.backward()
    assert x_BD.grad is not None and x_BD.grad[3].abs().sum() == 0 and x_BD.grad.isfinite().all()


def test_items_of_which_none_has_a_place_cost_nothing() -> None:
    x_BD = normalize(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), dim=1).requires_grad_()
    loss = NeighbourTerm()(x_BD, torch.zeros(2, 5))
    loss.backward()
    assert loss.item() == 0 and x_BD.grad is not None and x_BD.grad.abs().sum() == 0
