"""Batches of pairs for SCL: which contents face each other, and what of them the encoder is shown."""

# P pairs, C contents (queries and items), B pairs of one batch, H hard negatives of a pair, S tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from prerank_tools.encoders.batches import Batch, Tokens, fill_batch
from prerank_tools.encoders.fusion import Fusion
from prerank_tools.encoders.word_dropout import draw
from prerank_tools.training.batches import ShuffledRows

MINING_TRIES = 4


@dataclass(frozen=True)
class PairRows:
    """P pairs as rows of a content table; `item_id_C` and `group_C` (equal titles) are codes, -1: none."""

    query_P: np.ndarray
    item_P: np.ndarray
    item_text_P: np.ndarray  # False: the item's text is the query, so only its image may answer
    item_id_C: np.ndarray
    group_C: np.ndarray
    hard: Sequence[np.ndarray] = ()  # per pair the contents of its hard negatives; () where no pair has any
    category_C: np.ndarray | None = None  # int64, -1: none; where given, pairs without hard ones mine here

    def __len__(self) -> int:
        return len(self.query_P)

    def take(self, rows: np.ndarray) -> PairRows:
        """The same table with some of its pairs."""
        hard = [self.hard[row] for row in rows] if len(self.hard) else ()
        return PairRows(
            self.query_P[rows],
            self.item_P[rows],
            self.item_text_P[rows],
            self.item_id_C,
            self.group_C,
            hard,
            self.category_C,
        )


class Contents(Protocol):
    """Rows of content as encoder inputs; where `text_B` is False the text is withheld."""

    def inputs(self, rows_B: np.ndarray, text_B: np.ndarray | None = None) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class FeatureContents:
    """Contents already encoded by frozen towers: only the fusion is left to train."""

    text_CT: Tensor
    image_CI: Tensor
    has_text_C: Tensor
    has_image_C: Tensor
    short_VCT: Tensor | None = None  # of the texts with words left out

    def inputs(self, rows_B: np.ndarray, text_B: np.ndarray | None = None) -> dict[str, Tensor]:
        """What `FeatureEncoder` takes."""
        rows = torch.from_numpy(rows_B)
        has_text_B = self.has_text_C[rows]
        if text_B is not None:
            has_text_B = has_text_B & torch.from_numpy(text_B)
        return {
            "text": self.text_CT[rows],
            "image": self.image_CI[rows],
            "has_text": has_text_B,
            "has_image": self.has_image_C[rows],
        }

    def whole(self, rows_B: np.ndarray, seed: Sequence[int]) -> dict[str, Tensor]:
        """Everything there is of these contents, some texts without some of their words (by `seed`)."""
        found = self.inputs(rows_B)
        if self.short_VCT is not None:
            variant_B = torch.from_numpy(draw(rows_B, len(self.short_VCT), seed))
            short_BT = self.short_VCT[(variant_B - 1).clamp(min=0), torch.from_numpy(rows_B)]
            found["text"] = torch.where((variant_B > 0)[:, None], short_BT, found["text"])
        return found


class FeatureEncoder(nn.Module):
    """The fusion over frozen features; `dropout` hides entries of the features while training (ours)."""

    def __init__(self, fusion: Fusion, dropout: float = 0.0) -> None:
        super().__init__()
        self.fusion = fusion
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        text_BT, image_BI = self.dropout(inputs["text"]), self.dropout(inputs["image"])
        return self.fusion(text_BT, image_BI, inputs["has_text"], inputs["has_image"])


@dataclass(frozen=True)
class RawContents:
    """Contents as token ids and pictures, for towers that learn; pictures are decoded batch by batch."""

    ids: Sequence[Sequence[int]]  # empty: no text
    has_image_C: np.ndarray
    pixels: Callable[[int], np.ndarray]  # content row -> float32 (C, H, W)
    pad_id: int
    length: int | None = None  # SigLIP's fixed one

    def inputs(self, rows_B: np.ndarray, text_B: np.ndarray | None = None) -> dict[str, Tensor]:
        """What `ItemEncoder` takes; a modality that no row has is left out."""
        shown = np.array([bool(self.ids[row]) for row in rows_B])
        if text_B is not None:
            shown &= text_B
        return {**self._tokens(rows_B, shown), **self._pixels(rows_B)}

    def _tokens(self, rows_B: np.ndarray, shown_B: np.ndarray) -> dict[str, Tensor]:
        ids = [self.ids[row] if show else [] for row, show in zip(rows_B, shown_B, strict=True)]
        length = self.length or max(1, *(len(tokens) for tokens in ids), 1)
        ids_BS, mask_BS = fill_batch(
            Tokens.of(ids), Batch(np.arange(len(ids)), length, len(ids)), pad_id=self.pad_id
        )
        return {
            "input_ids": torch.from_numpy(ids_BS),
            "attention_mask": torch.from_numpy(mask_BS),
            "has_text": torch.from_numpy(shown_B),
        }

    def _pixels(self, rows_B: np.ndarray) -> dict[str, Tensor]:
        has_B = self.has_image_C[rows_B]
        if not has_B.any():
            return {}
        found = [self.pixels(int(row)) if has else None for row, has in zip(rows_B, has_B, strict=True)]
        blank = np.zeros_like(next(picture for picture in found if picture is not None))
        stacked = np.stack([blank if picture is None else picture for picture in found])
        return {"pixel_values": torch.from_numpy(stacked), "has_image": torch.from_numpy(has_B)}


@dataclass(frozen=True)
class PairBatches:
    """Shuffled pairs as `Scl` takes them; hard negatives are a function of (seed, epoch, pair)."""

    pairs: PairRows
    contents: Contents
    batch_size: int
    seed: int = 42
    with_hard: bool = True
    space_CE: Tensor | None = None  # of `neighbour_space`, zero where a content is not whole
    order: ShuffledRows = field(init=False)

    def __post_init__(self) -> None:
        order = ShuffledRows(len(self.pairs), lambda rows_B: rows_B, self.batch_size, self.seed)
        object.__setattr__(self, "order", order)

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, number: int, *, rank: int = 0, world: int = 1) -> Iterator[dict[str, Any]]:
        """This rank's batches of one epoch."""
        for rows_B in self.order.epoch(number, rank=rank, world=world):
            yield self.batch(rows_B, number)

    def batch(self, rows_B: np.ndarray, epoch: int) -> dict[str, Any]:
        """Both sides of these pairs, and one hard negative each where there is one."""
        pairs = self.pairs
        query_B, item_B, text_B = pairs.query_P[rows_B], pairs.item_P[rows_B], pairs.item_text_P[rows_B]
        found: dict[str, Any] = {
            "query": self.contents.inputs(query_B),
            "item": self.contents.inputs(item_B, text_B),
            "item_id": torch.from_numpy(pairs.item_id_C[item_B]),
            "group": torch.from_numpy(pairs.group_C[item_B]),
        }
        if self.space_CE is not None and isinstance(self.contents, FeatureContents):
            found["whole"] = self.contents.whole(item_B, [self.seed, epoch])
            found["space"] = self.space_CE[torch.from_numpy(item_B)]
        if self.with_hard and (len(pairs.hard) or pairs.category_C is not None):
            hard_B, has_B = self._hard(rows_B, epoch)
            found["hard"] = self.contents.inputs(hard_B, text_B)
            found["has_hard"] = torch.from_numpy(has_B)
        return found

    def _hard(self, rows_B: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """A logged negative where the pair has some, else one of the item's category; else the item."""
        hard_B = self.pairs.item_P[rows_B].copy()
        has_B = np.zeros(len(rows_B), dtype=bool)
        for place, row in enumerate(rows_B.tolist()):
            dice = np.random.default_rng([self.seed, epoch, row])
            candidates = self.pairs.hard[row] if len(self.pairs.hard) else ()
            found = dice.choice(candidates) if len(candidates) else self._mine(int(hard_B[place]), dice)
            if found is not None:
                hard_B[place], has_B[place] = found, True
        return hard_B, has_B

    def _mine(self, item: int, dice: np.random.Generator) -> int | None:
        """An item of the same category and another group (ours); None where a few tries find none."""
        pairs = self.pairs
        if pairs.category_C is None or pairs.category_C[item] < 0:
            return None
        members = self._members[int(pairs.category_C[item])]
        for candidate in dice.choice(members, MINING_TRIES):
            same_group = pairs.group_C[candidate] == pairs.group_C[item] != -1
            if not same_group and pairs.item_id_C[candidate] != pairs.item_id_C[item]:
                return int(candidate)
        return None

    @property
    def _members(self) -> dict[int, np.ndarray]:
        if "_by_category" not in self.__dict__:
            category_C = self.pairs.category_C
            assert category_C is not None
            items = np.unique(self.pairs.item_P)
            order = items[np.argsort(category_C[items], kind="stable")]
            cuts = np.flatnonzero(np.diff(category_C[order])) + 1
            found = {int(category_C[part[0]]): part for part in np.split(order, cuts)}
            object.__setattr__(self, "_by_category", found)
        by_category: dict[int, np.ndarray] = self.__dict__["_by_category"]
        return by_category


def retrieval_metrics(query_ND: Tensor, item_ND: Tensor) -> dict[str, float]:
    """Acc@1, Acc@5 and recall@10 of each query's own item among all N; a tie with another counts half."""
    scores_NN = query_ND @ item_ND.T
    own_N = scores_NN.diagonal()[:, None]
    # The own item ties with itself, hence minus one.
    rank_N = (scores_NN > own_N).sum(1) + ((scores_NN == own_N).sum(1) - 1) / 2
    return {
        f"{name}@{k}": float((rank_N < k).float().mean())
        for name, k in (("acc", 1), ("acc", 5), ("recall", 10))
    }
