"""Picture <-> title pairs never show an item whole: what training does so that its fused vector is good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prerank_tools.encoders.fusion import FusionConfig, Kind, build_fusion
from prerank_tools.encoders.neighbours import NeighbourConfig
from prerank_tools.encoders.pair_batches import (
    FeatureContents,
    FeatureEncoder,
    PairBatches,
    PairRows,
)
from prerank_tools.encoders.pretrain import (
    EncoderTraining,
    Split,
    TrainEncoderConfig,
    neighbour_weight,
    pretrain,
    space_of,
)
from tests.encoders.test_neighbours import catalogue, same_kind


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pairs_of(count: int, *, shows_text: bool = False) -> PairRows:
    """Items are contents 0 .. N, their titles as queries N .. 2N."""
    return PairRows(
        np.arange(count, 2 * count),
        np.arange(count),
        np.full(count, shows_text),
        np.r_[np.arange(count), np.full(count, -1)],
        np.full(2 * count, -1),
    )


def contents_of(text_ND: torch.Tensor, image_ND: torch.Tensor) -> FeatureContents:
    there = torch.ones(2 * len(text_ND), dtype=torch.bool)
    pictured = there & (torch.arange(len(there)) < len(text_ND))
    return FeatureContents(text_ND.repeat(2, 1), torch.cat([image_ND, 0 * image_ND]), there, pictured)


def fused(folder: Path, kind: Kind, weight: float) -> tuple[float, float, float]:
    """kNN@10 of the kind by text, by picture and by both, after SCL on picture <-> title pairs."""
    text_ND, image_ND, kind_N = catalogue()
    contents, count = contents_of(text_ND, image_ND), len(text_ND)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"text_dim": 16, "image_dim": 24, "dim": 16, "hidden": 32}
    encoder = FeatureEncoder(build_fusion(FusionConfig(kind=kind, **shape)), 0.1)
    config = TrainEncoderConfig(
        training=EncoderTraining(epochs=60, batch_size=50, lr=3e-3, patience=0),
        fusion={"dim": 16},  # type: ignore[arg-type]
        neighbours=NeighbourConfig(weight=weight, dims=16),
    )
    pairs = pairs_of(count)
    pretrain(
        encoder, contents, split=Split(pairs, pairs.take(np.array([], int))), config=config, folder=folder
    )
    rows = np.arange(count)
    with torch.no_grad():
        seen = (rows + count, None), (rows, np.zeros(count, dtype=bool)), (rows, None)
        text, image, both = (same_kind(encoder(contents.inputs(*what)), kind_N) for what in seen)
    return text, image, both


def test_held_to_its_neighbours_the_fused_vector_beats_the_better_modality(tmp_path: Path) -> None:
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
    text, image, both = fused(tmp_path / "with", "residual", 1.0)
    *_, without = fused(tmp_path / "without", "concat", 0.0)
    assert both > max(text, image) + 0.05
    assert both > without + 0.05


def test_by_default_only_pairs_that_show_no_item_whole_get_the_term() -> None:
    for shows_text, expected in ((False, 1.0), (True, 0.0)):
        assert neighbour_weight(NeighbourConfig(), pairs_of(4, shows_text=shows_text)) == expected
        assert neighbour_weight(NeighbourConfig(weight=0.5), pairs_of(4, shows_text=shows_text)) == 0.5


def test_only_whole_items_of_the_training_pairs_have_a_place() -> None:
    text_ND, image_ND, _ = catalogue(items=20)
    contents = contents_of(text_ND, image_ND)
    contents.has_image_C[3] = False
    pairs = pairs_of(20).take(np.arange(10))
    space_CE = space_of(contents, pairs, NeighbourConfig(dims=4))
    assert space_CE is not None
    assert space_CE.any(1).nonzero()[:, 0].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    contents.has_text_C[:9] = False
    assert space_of(contents, pairs, NeighbourConfig()) is None  # one whole item is no neighbourhood


def test_a_batch_shows_whole_items_beside_the_halves() -> None:
    text_ND, image_ND, _ = catalogue(items=6)
    contents, space_CE = contents_of(text_ND, image_ND), torch.arange(24.0).reshape(12, 2)
    batch = PairBatches(pairs_of(6), contents, 4, space_CE=space_CE).batch(np.array([5, 2]), 0)
    assert batch["whole"]["has_text"].all() and batch["whole"]["has_image"].all()
    assert not batch["item"]["has_text"].any() and not batch["query"]["has_image"].any()
    assert batch["space"].tolist() == [[10.0, 11.0], [4.0, 5.0]]


def test_half_of_the_whole_views_lack_words_and_the_queries_never_do() -> None:
    text_CT = torch.arange(600.0)[:, None]
    there = torch.ones(600, dtype=torch.bool)
    short = torch.stack([text_CT + 1000, text_CT + 2000])
    contents = FeatureContents(text_CT, text_CT, there, there, short)
    pairs = PairRows(
        np.arange(300, 600), np.arange(300), np.zeros(300, bool), np.arange(600), np.full(600, -1)
    )
    batches = PairBatches(pairs, contents, 300, space_CE=torch.ones(600, 2))
    one, again, later = (batches.batch(np.arange(300), epoch) for epoch in (0, 0, 1))
    shown = one["whole"]["text"][:, 0]
    assert (shown % 1000).tolist() == list(range(300))
    assert set((shown // 1000).tolist()) == {0, 1, 2} and 100 < (shown < 1000).sum() < 200
    assert torch.equal(shown, again["whole"]["text"][:, 0])
    assert not torch.equal(shown, later["whole"]["text"][:, 0])
    assert one["query"]["text"][:, 0].tolist() == list(range(300, 600))
