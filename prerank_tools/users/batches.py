"""Batches for the user model: padded histories for inference, next baskets with negatives for training."""

# B rows of a batch, T events, C content dims, K candidates, H heads, S samples, I items

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prerank_tools.users.histories import Baskets, Catalogue, Histories, Log
from prerank_tools.users.tokens import Events, user_features

NEAR = 16  # batches among which histories are sorted by length, so that little is padding


class TrainBatch(NamedTuple):
    """Histories with candidates for the next basket."""

    events: Events
    item_BK: Tensor  # int64, hashed id
    content_BKC: Tensor
    label_BKH: Tensor
    weight_BK: Tensor  # 0 where a candidate is padding, or a negative that the basket held


@dataclass(frozen=True)
class Sampling:
    """How candidates are drawn (ours): by popularity to a power, from all items alike, or half each."""

    positives: int = 4
    negatives: int = 16
    kind: Literal["mixed", "popularity", "uniform"] = "mixed"
    power: float = 0.75
    drop_events: float = 0.0  # chance that an event is left out of a training history


@dataclass(frozen=True)
class NextBaskets:
    """Training batches: a user's history and what the basket after it held, in another order every epoch."""

    log: Log
    catalogue: Catalogue
    histories: Histories
    baskets: Baskets
    label_NH: np.ndarray  # bool: the event is a positive of the head
    sampling: Sampling
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return math.ceil(len(self.baskets.rows) / self.batch_size)

    def epoch(self, number: int, *, rank: int = 0, world: int = 1) -> Iterator[TrainBatch]:
        """This rank's share of every batch; a function of the seed and the epoch."""
        for step, whole in enumerate(self._order(number)):
            share = whole[rank::world]
            batch = self._batch(share if len(share) else whole[:1], [self.seed, number, step, rank])
            # Every rank takes part in every step; one that is left without rows adds nothing to it.
            yield batch if len(share) else batch._replace(weight_BK=batch.weight_BK * 0)

    def _order(self, number: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, number])
        lengths = np.array([len(rows) for rows in self.histories.rows])
        batches = []
        for near in _blocks(rng.permutation(len(lengths)), self.batch_size * NEAR):
            batches += _blocks(near[np.argsort(lengths[near], kind="stable")], self.batch_size)
        return [batches[i] for i in rng.permutation(len(batches))]

    def _batch(self, which: np.ndarray, seeds: list[int]) -> TrainBatch:
        rng = np.random.default_rng(seeds)
        drawn = [self._positives(sample, rng) for sample in which]
        negatives = self._negatives(len(which), rng)
        item_BK, label_BKH, weight_BK = self._candidates(which, drawn, negatives)
        return TrainBatch(
            events=pad(self.log, self.catalogue, self._thinned(which, rng)),
            item_BK=torch.from_numpy(self.catalogue.bucket_I[item_BK]),
            content_BKC=torch.from_numpy(self.catalogue.content_IC[item_BK]),
            label_BKH=torch.from_numpy(label_BKH),
            weight_BK=torch.from_numpy(weight_BK),
        )

    def _thinned(self, which: np.ndarray, rng: np.random.Generator) -> Histories:
        """Histories with events left out at random; the newest one stays, ages are counted from it."""
        whole = self.histories.take(which)
        kept = [rng.random(len(rows)) >= self.sampling.drop_events for rows in whole.rows]
        for keep in kept:
            keep[-1] = True
        return Histories([rows[keep] for rows, keep in zip(whole.rows, kept, strict=True)], whole.count_S)

    def _positives(self, sample: int, rng: np.random.Generator) -> np.ndarray:
        rows = self.baskets.rows[sample]
        items = np.unique(self.log.item_N[rows[self.label_NH[rows].any(axis=1)]])
        return rng.permutation(items)[: self.sampling.positives]

    def _negatives(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        count = self.sampling.negatives
        popular = np.searchsorted(self._cumulative, rng.random((rows, count)), side="right")
        uniform = rng.integers(0, self.catalogue.padding, (rows, count))
        share = {"mixed": 0.5, "popularity": 1.0, "uniform": 0.0}[self.sampling.kind]
        return np.where(np.arange(count) < share * count, popular, uniform)

    @cached_property
    def _cumulative(self) -> np.ndarray:
        """Cumulative chance of every item, by how often the log holds it."""
        counts = np.bincount(self.log.item_N, minlength=self.catalogue.padding)[: self.catalogue.padding]
        chance = counts.astype(np.float64) ** self.sampling.power
        return np.cumsum(chance / chance.sum())[:-1]

    def _candidates(
        self, which: np.ndarray, drawn: list[np.ndarray], negatives: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        most = self.sampling.positives
        item_BK = np.full((len(which), most + negatives.shape[1]), self.catalogue.padding)
        item_BK[:, most:] = negatives
        label_BKH = np.zeros((*item_BK.shape, self.label_NH.shape[1]), dtype=np.float32)
        weight_BK = np.zeros(item_BK.shape, dtype=np.float32)
        for row, (sample, items) in enumerate(zip(which, drawn, strict=True)):
            rows = self.baskets.rows[sample]
            bought, label_rows = self.log.item_N[rows], self.label_NH[rows]
            item_BK[row, : len(items)] = items
            for place, item in enumerate(items):
                label_BKH[row, place] = label_rows[bought == item].any(axis=0)
            weight_BK[row, : len(items)] = 1
            weight_BK[row, most:] = ~np.isin(negatives[row], bought)
        return item_BK, label_BKH, weight_BK


def pad(log: Log, catalogue: Catalogue, histories: Histories, *, length: int = 0, rows: int = 0) -> Events:
    """A batch of histories, padded on the left to `length` events and below to `rows` users where given."""
    length = max([length, 1, *(len(r) for r in histories.rows)])
    rows = max(rows, len(histories.rows))
    row_BT = np.full((rows, length), -1)
    for b, r in enumerate(histories.rows):
        row_BT[b, length - len(r) :] = r
    mask_BT = row_BT >= 0
    item_BT = np.where(mask_BT, log.item_N[row_BT], catalogue.padding)
    count_B = np.pad(histories.count_S, (0, rows - len(histories.rows)))
    mask, time = torch.from_numpy(mask_BT), torch.from_numpy(np.where(mask_BT, log.time_N[row_BT], 0))
    return Events(
        item_BT=torch.from_numpy(catalogue.bucket_I[item_BT]),
        content_BTC=torch.from_numpy(catalogue.content_IC[item_BT]),
        action_BT=torch.from_numpy(np.where(mask_BT, log.action_N[row_BT], 0)),
        surface_BT=torch.from_numpy(np.where(mask_BT, log.surface_N[row_BT], 0)),
        meta_BTM=torch.from_numpy(log.meta_NM[row_BT] * mask_BT[..., None]),
        time_BT=time,
        mask_BT=mask,
        user_BF=user_features(torch.from_numpy(count_B), time, mask),
    )


def fixed_shapes(lengths: np.ndarray, *, tokens: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """(samples, padded length, rows) of batches whose shape depends on each sample's own length alone.

    With the rows filled up by padding, a sample meets the same kernels whatever else is computed beside it,
    so its vector is equal to the last bit in a full and in an incremental run.
    """
    padded = np.array([_grid(int(length)) for length in lengths], dtype=np.int64)
    for length in np.unique(padded):
        rows = max(2, tokens // int(length))
        for which in _blocks(np.flatnonzero(padded == length), rows):
            yield which, int(length), rows


def _grid(length: int) -> int:
    """Next of 8, 16, 24, 32, 48, 64, 96, 128, ...: at most a third is padding from 16 events up."""
    steps = [8] + [size for power in range(4, 40) for size in (1 << power, 3 << (power - 1))]
    return next(size for size in steps if size >= length)


def _blocks(which: np.ndarray, size: int) -> list[np.ndarray]:
    return [which[start : start + size] for start in range(0, len(which), size)]
