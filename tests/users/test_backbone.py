"""The training-only part: no candidate reaches the user vector, the loss is the weighted cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prerank_tools.metrics.probability import normalized_entropy
from prerank_tools.users.artefact import UserModelSpec, build
from prerank_tools.users.backbone import DhenLayer, Training
from prerank_tools.users.batches import TrainBatch
from prerank_tools.users.llatte import LlatteConfig
from prerank_tools.users.tokens import Events, user_features

SPEC = UserModelSpec(
    model=LlatteConfig(
        layers=2, width=16, head_width=8, query_tokens=2, summaries=3, summary_width=4, part=4
    ),
    content=5,
    actions=("buy", "view"),
    surfaces=(),
    heads=("buy", "view"),
    backbone_layers=2,
    backbone_width=8,
    max_events=9,
    lag=0,
)


def one_batch(candidates: int = 4) -> TrainBatch:
    torch.manual_seed(3)
    time = torch.arange(7)[None].repeat(2, 1) * 5000
    mask = torch.ones(2, 7, dtype=torch.bool)
    events = Events(
        torch.randint(0, 9, (2, 7)),
        torch.randn(2, 7, 5),
        torch.randint(0, 3, (2, 7)),
        torch.zeros(2, 7).long(),
        torch.rand(2, 7, 2),
        time,
        mask,
        user_features(torch.tensor([7, 7]), time, mask),
    )
    labels = torch.randint(0, 2, (2, candidates, 2)).float()
    return TrainBatch(
        events, torch.randint(1, 9, (2, candidates)), torch.randn(2, candidates, 5), labels, torch.ones(2, 4)
    )


def model(weights: tuple[float, ...] = (1.0, 1.0)) -> Training:
    torch.manual_seed(0)
    return build(SPEC, head_weights=weights)


def test_no_candidate_reaches_the_user_vector() -> None:
    training, batch = model(), one_batch()
    batch.content_BKC.requires_grad_()
    seen: list[Tensor] = []
    training.user.register_forward_hook(lambda module, args, out: seen.append(out))
    logits = training.logits(batch)
    other = batch._replace(item_BK=batch.item_BK % 3 + 1, content_BKC=batch.content_BKC.detach() * -2)
    assert not torch.equal(training.logits(other), logits)
    assert torch.equal(seen[0], seen[1])
    assert torch.autograd.grad(seen[0].sum(), batch.content_BKC, allow_unused=True) == (None,)


def test_candidates_do_not_see_each_other() -> None:
    training, batch = model().double(), one_batch()
    batch = batch._replace(
        events=Events(*(x.double() if x.is_floating_point() else x for x in batch.events)),
        content_BKC=batch.content_BKC.double(),
    )
    changed = batch.content_BKC.clone()
    changed[:, 1:] += 1
    before, after = training.logits(batch), training.logits(batch._replace(content_BKC=changed))
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=1e-12)
    assert (after[:, 1:] != before[:, 1:]).all()


def test_loss_is_the_weighted_mean_of_the_heads() -> None:
    training, batch = model((2.0, 0.5)), one_batch()
    weight = torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 1]])
    outputs = training(batch._replace(weight_BK=weight))
    p = training.logits(batch).sigmoid()
    cost = -(batch.label_BKH * p.log() + (1 - batch.label_BKH) * (1 - p).log())
    expected = ((2.0 * cost[..., 0] + 0.5 * cost[..., 1]) * weight).sum() / 5
    torch.testing.assert_close(outputs["loss"], expected)
    assert outputs["weight"] == 5


def test_a_batch_without_weight_adds_nothing() -> None:
    training, batch = model(), one_batch()
    outputs = training(batch._replace(weight_BK=torch.zeros(2, 4)))
    assert (outputs["loss"].item(), outputs["weight"].item()) == (0.0, 0.0)


def test_every_interaction_of_a_layer_takes_part() -> None:
    torch.manual_seed(0)
    layer, x = DhenLayer(3, 8), torch.randn(5, 3, 8)
    whole = layer(x)
    for part in (layer.dot, layer.qkv, layer.cross_up, layer.mix):
        kept = part.weight.data.clone()
        part.weight.data.zero_()
        assert not torch.allclose(layer(x), whole), part
        part.weight.data.copy_(kept)


def test_constant_predictor_has_ne_one() -> None:
    labels = torch.tensor([1.0, 0, 0, 0]).numpy()
    assert normalized_entropy(labels, torch.full((4,), 0.25).numpy()) == pytest.approx(1.0)
    assert normalized_entropy(labels, torch.full((4,), 0.5).numpy()) == pytest.approx(
        math.log(2) / -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    )
