"""The upstream user model against its definition: absorbed attention, trimming, padding, counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prerank_tools.users.llatte import Layer, LlatteConfig, UserModel
from prerank_tools.users.mla import LatentAttention
from prerank_tools.users.tokens import Events, TokenSizes, user_features

SIZES = TokenSizes(content=6, item_buckets=20, actions=3, surfaces=2, part=4)
SMALL = LlatteConfig(
    layers=3, width=16, head_width=8, query_rank=8, kv_rank=8, query_tokens=2, item_buckets=20
)


def histories(rows: int, length: int, *, seed: int = 0, left: int = 0) -> Events:
    """Random histories of `length` real events after `left` padded ones."""
    g = torch.Generator().manual_seed(seed)
    total = left + length
    mask = torch.zeros(rows, total, dtype=torch.bool)
    mask[:, left:] = True
    time = torch.randint(0, 9_000_000, (rows, length), generator=g).sort(dim=1).values + 1_600_000_000

    def pad(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(rows, left, *x.shape[2:]), x], dim=1)

    time = pad(time)
    return Events(
        item_BT=pad(torch.randint(0, 21, (rows, length), generator=g)),
        content_BTC=pad(torch.randn(rows, length, 6, generator=g, dtype=torch.float64)),
        action_BT=pad(torch.randint(0, 3, (rows, length), generator=g)),
        surface_BT=pad(torch.randint(0, 2, (rows, length), generator=g)),
        meta_BTM=pad(torch.rand(rows, length, 2, generator=g, dtype=torch.float64)),
        time_BT=time,
        mask_BT=mask,
        user_BF=user_features(torch.full((rows,), length), time, mask).double(),
    )


def model(config: LlatteConfig = SMALL) -> UserModel:
    torch.manual_seed(1)
    return UserModel(config, SIZES).double().eval()


def test_absorbed_attention_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    mla = LatentAttention(16, heads=3, head_width=5, query_rank=7, kv_rank=6).double()
    x = torch.randn(4, 9, 16, dtype=torch.float64)
    mask = torch.arange(9) >= torch.tensor([[0], [3], [5], [8]])
    plain = mla(x, mask, kept=4)
    latent = mla.latent(x)
    assert latent.shape == (4, 9, 6)  # what a cache holds: kv_rank numbers a token
    torch.testing.assert_close(mla.absorbed(x[:, -4:], latent, mask), plain, rtol=0, atol=1e-12)


def test_attention_against_the_formula() -> None:
    torch.manual_seed(0)
    mla = LatentAttention(8, heads=1, head_width=4, query_rank=5, kv_rank=6).double()
    x = torch.randn(1, 3, 8, dtype=torch.float64)

    def rms(v: Tensor, w: Tensor) -> Tensor:
        return v / (v.square().mean(-1, keepdim=True) + torch.finfo(v.dtype).eps).sqrt() * w

    q = rms(x[0] @ mla.query_down.weight.T, mla.query_norm.weight) @ mla.query_up.weight.T
    kv = rms(x[0] @ mla.kv_down.weight.T, mla.kv_norm.weight) @ mla.kv_up.weight.T
    expected = (q @ kv[:, :4].T / 2).softmax(-1) @ kv[:, 4:] @ mla.out.weight.T
    torch.testing.assert_close(mla(x, torch.ones(1, 3, dtype=torch.bool), kept=3)[0], expected)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_trimmed_layer_equals_the_slice_of_the_whole_layer(norm: str) -> None:
    torch.manual_seed(0)
    layer = Layer(SMALL.model_copy(update={"norm": norm})).double()
    x = torch.randn(3, 10, 16, dtype=torch.float64)
    mask = torch.arange(10) >= torch.tensor([[0], [2], [6]])
    whole = layer(x, mask, kept=10)
    for kept in (1, 4, 10):
        torch.testing.assert_close(layer(x, mask, kept=kept), whole[:, -kept:], rtol=0, atol=1e-12)


def test_rows_after_each_layer() -> None:
    assert SMALL.rows_after(50) == [52, 52, 2]
    pyramid = SMALL.model_copy(update={"keep": (200, 64, 0)})
    assert pyramid.rows_after(400) == [202, 66, 2]
    assert pyramid.rows_after(100) == [102, 66, 2]


@pytest.mark.parametrize("keep", [(4, 0), (4, 8, 0), (8, 4, 2)])
def test_schedule_that_cannot_work_is_refused(keep: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="falling numbers that end in 0"):
        UserModel(SMALL.model_copy(update={"keep": keep}), SIZES)


@pytest.mark.parametrize("keep", [(), (6, 3, 0)])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_left_padding_changes_nothing(norm: str, keep: tuple[int, ...]) -> None:
    user_model = model(SMALL.model_copy(update={"norm": norm, "keep": keep}))
    bare = user_model.embed(histories(5, 12))
    torch.testing.assert_close(user_model.embed(histories(5, 12, left=9)), bare, rtol=0, atol=1e-10)


def test_right_padding_changes_nothing_where_nothing_is_trimmed() -> None:
    user_model, events = model(), histories(2, 7, left=3)

    def to_right(x: Tensor) -> Tensor:
        return torch.cat([x[:, 3:], x[:, :3]], dim=1)

    right = Events(*(to_right(x) if name != "user_BF" else x for name, x in events._asdict().items()))
    torch.testing.assert_close(user_model.embed(right), user_model.embed(events), rtol=0, atol=1e-10)


def test_content_of_padding_is_never_read() -> None:
    user_model, events = model(), histories(3, 5, left=4)
    pad = ~events.mask_BT
    noisy = events._replace(
        item_BT=events.item_BT.masked_fill(pad, 7),
        content_BTC=events.content_BTC.masked_fill(pad[..., None], 1e3),
        time_BT=events.time_BT.masked_fill(pad, 2_000_000_000),
    )
    torch.testing.assert_close(user_model.embed(noisy), user_model.embed(events), rtol=0, atol=1e-12)


def test_other_users_of_the_batch_change_nothing() -> None:
    user_model, events = model(), histories(6, 8)
    alone = user_model.embed(Events(*(x[2:3] for x in events)))
    torch.testing.assert_close(user_model.embed(events)[2:3], alone, rtol=0, atol=1e-10)


def test_every_event_reaches_the_summary() -> None:
    events = histories(1, 6)
    events.content_BTC.requires_grad_()
    model().embed(events).square().sum().backward()
    assert events.content_BTC.grad is not None
    assert (events.content_BTC.grad.abs().sum(-1) > 0).all()


def test_time_is_relative_to_the_newest_event_and_to_the_week() -> None:
    user_model, events = model(), histories(2, 6)
    moved = events._replace(time_BT=events.time_BT + 3 * 604_800)
    torch.testing.assert_close(user_model.embed(moved), user_model.embed(events), rtol=0, atol=1e-9)
    stretched = events._replace(time_BT=events.time_BT - 3600 * torch.arange(6, 0, -1))
    assert (user_model.embed(stretched) - user_model.embed(events)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("layers", "width", "published"), [(8, 128, 0.85), (4, 256, 1.16), (8, 256, 2.33), (2, 1024, 6.93)]
)
def test_parameter_counts_are_the_published_ones(layers: int, width: int, published: float) -> None:
    config = LlatteConfig.paper_like().model_copy(update={"layers": layers, "width": width})
    with torch.device("meta"):
        count = sum(p.numel() for _ in range(layers) for p in Layer(config).parameters())
    assert count / 1e6 == pytest.approx(published, rel=0.01)


def test_paper_like_embedding_has_2048_numbers() -> None:
    config = LlatteConfig.paper_like()
    assert config.summaries * config.summary_width == 2048
