"""The three-tower model: the split is exact, towers run as often as they must, labels may be missing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from prerank_tools.scorers.packing import candidate_rows, pack, sample_negatives
from prerank_tools.scorers.serving import CachedScorer, weights_digest
from prerank_tools.scorers.three_tower import ThreeTower
from prerank_tools.scorers.towers import CodeEmbeddings, InputScale
from prerank_tools.training.batches import ShuffledRows
from prerank_tools.training.loop import TrainConfig, train

sys.path.insert(0, str(Path(__file__).parent))
from three_tower_toy import arrays, three_tower

torch.set_num_threads(1)


def concatenated(model: ThreeTower, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The network as the deck draws it: concatenate the towers' outputs a candidate, then the upper MLP."""
    z_u = model.user_tower(model.user_scale(batch["user_BF"]))[batch["request_of_n"]]
    item_in = torch.cat([model.item_scale(batch["item_mF"]), model.codes(batch["codes_mC"])], dim=1)
    z_i = model.item_tower(item_in)[batch["item_of_n"]]
    z_c = model.cross_tower(model.cross_scale(batch["cross_nF"]))
    match = model.user_match(z_u) * model.item_match(z_i)
    h0 = torch.cat([z_u, z_i, z_c, match, match.sum(1, keepdim=True)], dim=1)
    return model.heads(model.upper(model.first(h0)))


def test_the_first_layer_split_equals_the_concatenation() -> None:
    requests, items = arrays(requests=40, items=30)
    batch, model = pack(requests, items, np.arange(40)), three_tower()
    difference = (model.logits(batch) - concatenated(model, batch)).abs().max()
    assert float(difference.detach()) < 1.5e-6


def test_towers_run_once_a_request_once_a_miss_and_once_a_candidate() -> None:
    requests, items = arrays(requests=6, items=9)
    scorer = CachedScorer(
        three_tower(), *(torch.from_numpy(a) for a in (items.item_NF, items.codes_NC)), features="1"
    )
    user, cross = torch.from_numpy(requests.user_RF), torch.from_numpy(requests.cross_nF)
    n, distinct = len(requests.item_n), len(np.unique(requests.item_n))
    for repeat in (1, 2):
        scorer.probabilities(user, torch.from_numpy(requests.request_n), requests.item_n, cross)
        assert (scorer.rows.user, scorer.rows.item, scorer.rows.candidate) == (
            6 * repeat,
            distinct,
            n * repeat,
        )
    assert (scorer.cache.misses, scorer.cache.hits) == (distinct, distinct)


def test_serving_gives_what_training_computes() -> None:
    requests, items = arrays(requests=12)
    model = three_tower()
    scorer = CachedScorer(
        model, torch.from_numpy(items.item_NF), torch.from_numpy(items.codes_NC), features="1"
    )
    served = scorer.probabilities(
        torch.from_numpy(requests.user_RF),
        torch.from_numpy(requests.request_n),
        requests.item_n,
        torch.from_numpy(requests.cross_nF),
    )
    with torch.no_grad():
        trained = torch.sigmoid(model.logits(pack(requests, items, np.arange(12)))).numpy()
    np.testing.assert_allclose(served, trained, atol=2e-6)


def test_down_sampling_is_undone_when_serving() -> None:
    requests, items = arrays()
    inputs = (torch.from_numpy(items.item_NF), torch.from_numpy(items.codes_NC))
    call = (
        torch.from_numpy(requests.user_RF),
        torch.from_numpy(requests.request_n),
        requests.item_n,
        torch.from_numpy(requests.cross_nF),
    )
    whole = CachedScorer(three_tower(), *inputs, features="1").probabilities(*call)
    tenth = CachedScorer(three_tower(negative_rate=0.1), *inputs, features="1").probabilities(*call)
    np.testing.assert_allclose(tenth, 0.1 * whole / (1 - whole + 0.1 * whole), rtol=1e-6)


def test_a_missing_label_does_not_count() -> None:
    model, batch = three_tower(), pack(*arrays(), np.arange(5))
    like = batch["label_nK"][:, 1].clone()
    batch["label_nK"][:, 1] = torch.nan
    alone = model(batch)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        model.logits(batch)[:, 0], batch["label_nK"][:, 0]
    )
    torch.testing.assert_close(alone["loss"], expected)
    assert alone["weight"] == len(like)


def test_packing_chooses_the_candidates_of_the_chosen_requests() -> None:
    rows, request = candidate_rows(np.array([0, 2, 2, 5]), np.array([2, 1, 0]))
    assert rows.tolist() == [2, 3, 4, 0, 1]
    assert request.tolist() == [0, 0, 0, 2, 2]


def test_negative_sampling_keeps_every_positive_and_the_rate_of_the_rest() -> None:
    labels = np.array([[1.0, np.nan], [0.0, 1.0]] + [[0.0, 0.0]] * 10_000)
    kept = sample_negatives(labels, 0.2, seed=0)
    assert kept is not None and kept[:2].all()
    assert abs(kept[2:].mean() - 0.2) < 0.02
    assert sample_negatives(labels, 1.0, seed=0) is None
    requests, items = arrays()
    batch = pack(requests, items, np.arange(5), keep_n=requests.item_n == requests.item_n[0])
    assert set(batch["item_of_n"].tolist()) == {0}


def test_block_scale_leaves_missing_rows_at_zero() -> None:
    scale = InputScale(3)
    scale.fit_blocks(torch.tensor([[0.0, 0.0, 5.0], [3.0, 4.0, 5.0]]), (2, 1))
    scaled = scale(torch.tensor([[0.0, 0.0, 5.0], [3.0, 4.0, 10.0]]))
    torch.testing.assert_close(scaled, torch.tensor([[0, 0, 1.0], [3 / 12.5**0.5, 4 / 12.5**0.5, 2.0]]))


def test_column_scale_silences_a_constant() -> None:
    scale = InputScale(2)
    scale.fit_columns(torch.tensor([[1.0, 7.0], [3.0, 7.0]]))
    assert scale(torch.tensor([[1.0, 900.0]])).tolist() == [[-1.0, 0.0]]


def test_codes_beyond_the_book_and_unknown_ones_are_read_safely() -> None:
    torch.manual_seed(0)
    codes = CodeEmbeddings((4,), 2)
    rows = codes(torch.tensor([[-1], [0], [3], [99]]))
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[3]) and not torch.equal(rows[0], rows[2])
    assert CodeEmbeddings((), 2)(torch.zeros((3, 0), dtype=torch.long)).shape == (3, 0)


def test_training_learns_a_planted_signal_and_repeats(tmp_path: Path) -> None:
    requests, items = arrays(requests=200, items=20)
    requests.label_nK[:, 0] = requests.cross_nF[:, 0] > 0
    digests = []
    for run in ("a", "b"):
        model = three_tower()
        model.fit_inputs(*(torch.from_numpy(a) for a in (requests.user_RF, items.item_NF, requests.cross_nF)),
                         torch.from_numpy(requests.label_nK))  # fmt: skip
        batches = ShuffledRows(200, lambda rows: pack(requests, items, rows), batch_size=16)
        train(model, batches, config=TrainConfig(epochs=6, lr=5e-3), folder=tmp_path / run)
        digests.append(weights_digest(model))
    with torch.no_grad():
        logit = model.logits(pack(requests, items, np.arange(200)))[:, 0]
    assert float(((logit > 0).float() == torch.from_numpy(requests.label_nK[:, 0])).float().mean()) > 0.95
    assert digests[0] == digests[1]


def test_multiply_adds_count_the_split() -> None:
    model = three_tower(
        user_hidden=(),
        item_hidden=(),
        upper=(10, 5),
        user_width=7,
        item_width=6,
        cross_width=4,
        match_width=3,
    )
    expected = {
        "user": 13 * 7 + 7 * (10 + 3),
        "item": (8 + 3 * 8) * 6 + 6 * (10 + 3),
        "candidate": 9 * 4 + 10 * (4 + 3) + 10 * 5 + 5 * 2,
    }
    assert model.multiply_adds() == expected
