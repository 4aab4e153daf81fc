"""Batches: fixed shapes that make vectors independent of their neighbours, labels of candidates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prerank_tools.users import histories, stage
from prerank_tools.users.batches import NextBaskets, Sampling, fixed_shapes
from prerank_tools.users.histories import Catalogue, Log
from prerank_tools.users.llatte import LlatteConfig, UserModel
from prerank_tools.users.stage import embed
from prerank_tools.users.tokens import TokenSizes


def random_log(users: int, items: int, *, seed: int = 0) -> tuple[Log, Catalogue]:
    """Users with 1 to 60 events in baskets of a few."""
    rng = np.random.default_rng(seed)
    user_N = np.repeat(np.arange(users), rng.integers(1, 61, users))
    count = len(user_N)
    time_N = 1_600_000_000 + rng.integers(0, 40, count) * 86_400
    order = np.lexsort((time_N, user_N))
    content = rng.standard_normal((items, 6)).astype(np.float32)
    log = Log(
        user_N=user_N,
        item_N=rng.integers(0, items, count),
        time_N=time_N[order],
        known_N=time_N[order],
        action_N=rng.integers(0, 3, count),
        surface_N=np.zeros(count, dtype=np.int64),
        meta_NM=rng.random((count, 2)).astype(np.float32),
    )
    return log, Catalogue(np.r_[1 + np.arange(items) % 9, 0], np.pad(content, ((0, 1), (0, 0))))


def test_shapes_depend_on_a_samples_own_length_alone() -> None:
    lengths = np.array([0, 1, 8, 9, 33, 49, 500])
    shape = {
        int(s): (length, rows) for which, length, rows in fixed_shapes(lengths, tokens=64) for s in which
    }
    assert shape == {0: (8, 8), 1: (8, 8), 2: (8, 8), 3: (16, 4), 4: (48, 2), 5: (64, 2), 6: (512, 2)}
    alone = [(length, rows) for _, length, rows in fixed_shapes(lengths[4:5], tokens=64)]
    assert alone == [shape[4]]


def test_vectors_are_equal_to_the_bit_whatever_is_computed_beside_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "BATCH_TOKENS", 2048)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    log, catalogue = random_log(80, 30)
    model = UserModel(LlatteConfig(item_buckets=9), TokenSizes(6, 9, 3, 1, 16)).eval()
    at = np.full(80, 2_000_000_000)
    known = histories.as_of(log, np.arange(80), at, limit=64)
    whole = embed(model, log, catalogue, known)
    some = np.random.default_rng(1).permutation(80)[:23]
    np.testing.assert_array_equal(embed(model, log, catalogue, known.take(some)), whole[some])


def training_batches(kind: str = "mixed", batch_size: int = 16) -> NextBaskets:
    log, catalogue = random_log(30, 12)
    found = histories.baskets(log, gap=0)
    known = histories.as_of(log, found.user_S, found.start_S, limit=20)
    which = np.flatnonzero(known.count_S)
    label_NH = np.stack([log.action_N == 1, log.action_N > 0], axis=1)
    sampling = Sampling(positives=2, negatives=6, kind=kind)  # type: ignore[arg-type]
    return NextBaskets(
        log, catalogue, known.take(which), found.take(which), label_NH, sampling, batch_size, 7
    )


def test_an_epoch_meets_every_basket_once_and_repeats_exactly() -> None:
    batches = training_batches()
    first, again = list(batches.epoch(3)), list(batches.epoch(3))
    assert len(first) == len(batches)
    assert sum(len(b.weight_BK) for b in first) == len(batches.baskets.rows)
    assert all(torch.equal(a.item_BK, b.item_BK) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].item_BK, next(iter(batches.epoch(4))).item_BK)


def test_two_ranks_share_every_batch() -> None:
    batches = training_batches(batch_size=7)
    one, two = list(batches.epoch(0, rank=0, world=2)), list(batches.epoch(0, rank=1, world=2))
    assert len(one) == len(two) == len(batches)
    rows = sum(int((b.weight_BK.sum(1) > 0).sum()) for b in (*one, *two))
    assert rows <= len(batches.baskets.rows)
    assert all(len(b.weight_BK) >= 1 for b in (*one, *two))


def test_labels_are_the_baskets_and_negatives_are_not_in_it() -> None:
    batches = training_batches()
    which = np.arange(10)
    batch = batches._batch(which, [0, 1])
    for row in which:
        rows = batches.baskets.rows[row]
        items, labels = batches.log.item_N[rows], batches.label_NH[rows]
        bucket_of = batches.catalogue.bucket_I
        for place in range(2):
            if batch.weight_BK[row, place] == 0:
                continue
            content = batch.content_BKC[row, place].numpy()
            item = int(np.flatnonzero((batches.catalogue.content_IC == content).all(axis=1))[0])
            assert item in items and batch.item_BK[row, place] == bucket_of[item]
            assert batch.label_BKH[row, place].tolist() == labels[items == item].any(axis=0).tolist()
        assert not batch.label_BKH[row, 2:].any()
        for place in range(2, 8):
            content = batch.content_BKC[row, place].numpy()
            item = int(np.flatnonzero((batches.catalogue.content_IC == content).all(axis=1))[0])
            assert bool(batch.weight_BK[row, place]) == (item not in items)


def test_histories_of_a_batch_end_before_their_baskets() -> None:
    batches = training_batches()
    batch = batches._batch(np.arange(20), [0])
    newest = torch.where(batch.events.mask_BT, batch.events.time_BT, 0).amax(1).numpy()
    assert (newest < batches.baskets.start_S[:20]).all()


def test_popularity_negatives_follow_the_log() -> None:
    batches = training_batches("popularity")
    drawn = batches._negatives(3000, np.random.default_rng(0))
    counts = np.bincount(batches.log.item_N, minlength=12).astype(float) ** 0.75
    np.testing.assert_allclose(
        np.bincount(drawn.ravel(), minlength=12) / drawn.size, counts / counts.sum(), atol=0.01
    )
