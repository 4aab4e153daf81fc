"""Fashion items, and one seed's split of them: what the encoder is trained on, and how it is measured."""

# N items, D dims

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
import torch

from prerank_tools.encoders.pair_batches import FeatureContents, FeatureEncoder, PairRows, retrieval_metrics
from prerank_tools.encoders.word_dropout import VARIANTS, shortened

CANDIDATES = 500
REPORTED = 5  # seeds whose test groups no tuning may touch
TUNING = 100  # seeds from here on hold out groups that are in no reported seed's test
WORD_SHARE = 0.3


def read_items(data: Path) -> pl.DataFrame:
    """Illustrated items by id; `bare` is the title without the words of its type (singular and plural)."""
    items = pl.read_parquet(data / "items.parquet").join(
        pl.read_parquet(data / "images_96px_5k.parquet").select("item_id", image="jpeg"), on="item_id"
    )
    items = items.sort("item_id").with_columns(pl.col("item_id").cast(pl.Int64))
    pairs = zip(items["title"].to_list(), items["articleType"].to_list(), strict=True)
    return items.with_columns(bare=pl.Series([without_type(title, kind) for title, kind in pairs]))


def without_type(title: str, kind: str) -> str:
    """The title less every word of the type, whatever its number."""
    stems = {stem(word) for word in re.findall(r"[a-z]+", kind.lower())}
    kept = [word for word in title.split() if stem(re.sub(r"[^a-z]", "", word.lower())) not in stems]
    return " ".join(kept) or "item"


def stem(word: str) -> str:
    """A word without its plural ending."""
    return re.sub(r"(es|s)$", "", word)


def texts_of(items: pl.DataFrame) -> dict[str, list[str]]:
    """Titles, titles without their type, and of each the copies with words left out at random."""
    texts = {name: items[name].to_list() for name in ("title", "bare")}
    for name in list(texts):
        copies = shortened(texts[name], share=WORD_SHARE, seed=42)
        texts |= {f"{name} {copy}": copies[copy] for copy in range(VARIANTS)}
    return texts


def held_groups(groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Title groups (held out, for training) of a seed; a tuning seed stays clear of all reported tests."""
    if seed < TUNING:
        order = np.random.default_rng(seed).permutation(groups)
        return order[:CANDIDATES], order[CANDIDATES:]
    reported = [held_groups(groups, number)[0] for number in range(REPORTED)]
    order = np.random.default_rng(seed).permutation(np.setdiff1d(groups, np.concatenate(reported)))
    return order[:CANDIDATES], order[CANDIDATES:]


class Fold:
    """One seed: 500 title groups held out, one item of each a candidate; the others are for training."""

    def __init__(self, items: pl.DataFrame, features: Mapping[str, np.ndarray], seed: int, text: str) -> None:
        group_N = codes(items["title"].str.to_lowercase())
        held, rest = held_groups(np.unique(group_N), seed)
        self.unseen = np.flatnonzero(np.isin(group_N, held))
        _, first = np.unique(group_N[self.unseen], return_index=True)
        self.test, self.fit = self.unseen[np.sort(first)], np.flatnonzero(np.isin(group_N, rest))
        self.text_ND, self.bare_ND, self.image_ND = (
            torch.from_numpy(features[name]) for name in (text, "bare", "image")
        )
        self.short_VND = torch.stack(
            [torch.from_numpy(features[f"{text} {copy}"]) for copy in range(VARIANTS)]
        )
        self.type_N = codes(items["articleType"])
        count, self.seed = len(items), seed
        # Contents: the items (0 .. N, both modalities), then their titles alone as queries (N .. 2N).
        self.pairs = PairRows(
            query_P=np.arange(count, 2 * count),
            item_P=np.arange(count),
            item_text_P=np.zeros(count, dtype=bool),
            item_id_C=np.r_[np.arange(count), np.full(count, -1)],
            group_C=np.r_[group_N, np.full(count, -1)],
            category_C=np.r_[self.type_N, np.full(count, -1)],
        )
        self.contents = self.shown(self.text_ND)

    def shown(self, text_ND: torch.Tensor, *, short: bool = False) -> FeatureContents:
        """The contents with these titles; `short`: training may leave out words of them."""
        count = len(text_ND)
        there = torch.ones(2 * count, dtype=torch.bool)
        return FeatureContents(
            text_ND.repeat(2, 1),
            torch.cat([self.image_ND, torch.zeros_like(self.image_ND)]),
            there,
            there & (torch.arange(2 * count) < count),
            self.short_VND.repeat(1, 2, 1) if short else None,
        )

    def measure(self, encoder: FeatureEncoder) -> dict[str, float]:
        """With the titles of training; and, as `late`, with the unseen items' titles less their type."""
        late = self._measure(encoder, self.shown(self.bare_ND))
        found = self._measure(encoder, self.contents)
        return found | {f"late {name}": value for name, value in late.items()}

    @torch.no_grad()
    def _measure(self, encoder: FeatureEncoder, contents: FeatureContents) -> dict[str, float]:
        """Both directions among the 500, and neighbours of the same type among the unseen items."""
        encoder.eval()
        nothing = np.zeros(len(self.test), dtype=bool)
        image = encoder(contents.inputs(self.test, nothing))
        title = encoder(contents.inputs(self.test + len(self.text_ND)))
        hidden = np.zeros(len(self.unseen), dtype=bool)
        by_part = {
            "knn": contents.inputs(self.unseen),
            "knn text": contents.inputs(self.unseen + len(self.text_ND)),
            "knn image": contents.inputs(self.unseen, hidden),
        }
        found = {f"i2t {name}": value for name, value in retrieval_metrics(image, title).items()}
        found |= {f"t2i {name}": value for name, value in retrieval_metrics(title, image).items()}
        return found | {name: self.same_type(encoder(inputs)) for name, inputs in by_part.items()}

    def same_type(self, x_ND: torch.Tensor, rows: np.ndarray | None = None) -> float:
        """Mean share of the same article type among the 10 nearest of each unseen item (or of `rows`)."""
        kind = torch.from_numpy(self.type_N[self.unseen if rows is None else rows])
        cosine = x_ND @ x_ND.T
        cosine.fill_diagonal_(-2)
        return float((kind[cosine.topk(10).indices] == kind[:, None]).float().mean())


def codes(values: pl.Series) -> np.ndarray:
    """Equal values, equal numbers."""
    return values.rank("dense").cast(pl.Int64).to_numpy()
