"""Pre-train an item encoder with SCL over contents: frozen features under a fusion, or towers that learn."""

# C contents, P pairs, V held-out pairs, D dims

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from prerank_tools.encoders.fusion import Kind
from prerank_tools.encoders.moco import Scl, SclConfig, bank_size
from prerank_tools.encoders.neighbours import NeighbourConfig, NeighbourTerm, neighbour_space
from prerank_tools.encoders.pair_batches import (
    Contents,
    FeatureContents,
    PairBatches,
    PairRows,
    retrieval_metrics,
)
from prerank_tools.encoders.settings import ImageConfig, TextConfig
from prerank_tools.encoders.tuning import Tune
from prerank_tools.training.loop import TrainConfig, TrainResult, train

EVAL_ROWS = 256


class EncoderTraining(TrainConfig):
    """The loop's knobs with an encoder's defaults (ours)."""

    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=256, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    warmup_steps: int = Field(default=20, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    patience: int = Field(default=5, ge=0)


class FusionShape(BaseModel):
    """The fusion to train; its input widths come from the towers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind | None = None  # None: residual over two modalities, concat over one
    dim: int = Field(default=128, gt=0)
    hidden: int = Field(default=256, gt=0)
    layers: int = Field(default=2, gt=0)
    heads: int = Field(default=4, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class TrainEncoderConfig(BaseModel):
    """Knobs of `[train.encoder]`. The output's 128 dims are the paper's, which is silent on the others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scl: SclConfig = SclConfig()
    training: EncoderTraining = EncoderTraining()
    neighbours: NeighbourConfig = NeighbourConfig()  # with tune = "head"
    fusion: FusionShape = FusionShape()
    tune: Tune = "head"  # what learns besides the fusion: nothing, `last` layers, `lora`, or `full`
    last_layers: int = Field(default=2, ge=1)
    lora_rank: int = Field(default=8, ge=1)
    tower_lr: float = Field(default=0.05, gt=0)  # times lr, for weights that were trained before
    feature_dropout: float = Field(default=0.2, ge=0, lt=1)  # with tune = "head"
    category: str | None = None  # column to mine negatives in, where a pair has no hard negatives
    extra_vocab: tuple[str, ...] = ()  # columns whose frequent words become tokens; not with tune = "head"
    extra_vocab_count: int = Field(default=10, ge=1)  # items a word must come in
    extra_vocab_size: int = Field(default=2000, ge=1)
    valid_share: float = Field(default=0.05, ge=0, lt=1)  # of the title groups, to stop early on
    valid_candidates: int = Field(default=500, ge=2)
    text: TextConfig = TextConfig()
    image: ImageConfig = ImageConfig()


@dataclass(frozen=True)
class Split:
    """Pairs to fit on and held-out ones, one for each title group, no group on both sides."""

    fit: PairRows
    valid: PairRows


def pretrain(
    encoder: nn.Module,
    contents: Contents,
    *,
    split: Split,
    config: TrainEncoderConfig,
    folder: Path,
    device: str = "cpu",
    log: Callable[..., None] = lambda *_, **__: None,
) -> tuple[TrainResult, dict[str, float]]:
    """Train `encoder` in place; returns how it went and the held-out pairs' Acc@1, Acc@5 and recall@10."""
    items = len(np.unique(split.fit.item_P))
    bank, warning = bank_size(config.scl, items, config.training.batch_size)
    if warning:
        log("bank", warning=warning)
    space_CE = space_of(contents, split.fit, config.neighbours)
    term = None
    if space_CE is not None:
        term = NeighbourTerm(neighbour_weight(config.neighbours, split.fit), config.neighbours.temperature)
        log("neighbours", weight=term.weight, items=int(space_CE.any(1).sum()))
    model = EncoderScl(encoder, dim=config.fusion.dim, bank=bank, config=config.scl, neighbours=term)
    model.tower_lr = config.tower_lr
    batches = PairBatches(
        split.fit,
        contents,
        config.training.batch_size,
        config.training.seed,
        with_hard=config.scl.triplet_weight > 0,
        space_CE=space_CE,
    )
    held_out = len(split.valid) > 1
    result = train(
        model,
        batches,
        config=config.training,
        folder=folder,
        evaluate=(lambda m: evaluate(m.encoder, contents, split.valid)) if held_out else None,  # type: ignore[arg-type]
        monitor="recall@10" if held_out else "loss",
        mode="max" if held_out else "min",
        device=device,
        log=log,
    )
    return result, evaluate(encoder, contents, split.valid) if held_out else {}


def neighbour_weight(config: NeighbourConfig, pairs: PairRows) -> float:
    """As configured; by default 1 where otherwise no item would ever be seen whole, 0 elsewhere."""
    if config.weight is None:
        return float(not pairs.item_text_P.any())
    return config.weight


def space_of(contents: Contents, pairs: PairRows, config: NeighbourConfig) -> Tensor | None:
    """Rows of `neighbour_space` for the pairs' items that have both modalities, zeros for other contents.

    None where the term has no weight, or nothing to stand on: towers that learn, fewer than two whole items.
    """
    if not neighbour_weight(config, pairs) or not isinstance(contents, FeatureContents):
        return None
    rows = torch.from_numpy(np.unique(pairs.item_P))
    rows = rows[(contents.has_text_C & contents.has_image_C)[rows]]
    if len(rows) < 2:
        return None
    z_NE = neighbour_space(contents.text_CT[rows], contents.image_CI[rows], config)
    space_CE = torch.zeros(len(contents.text_CT), z_NE.shape[1])
    space_CE[rows] = z_NE
    return space_CE


class EncoderScl(Scl):
    """SCL whose towers, trained before, learn more slowly than the fresh fusion."""

    tower_lr: float = 1.0

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Towers at `tower_lr` times lr; no decay on vectors, the temperature and embedding tables."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                tower = name.startswith(("encoder.text.", "encoder.image."))
                decayed = parameter.dim() > 1 and id(parameter) not in tables
                groups.setdefault((tower, decayed), []).append(parameter)
        return [
            {
                "params": params,
                "lr": lr * (self.tower_lr if tower else 1.0),
                "weight_decay": weight_decay if decayed else 0.0,
            }
            for (tower, decayed), params in sorted(groups.items())
        ]


@torch.no_grad()
def evaluate(encoder: nn.Module, contents: Contents, pairs: PairRows) -> dict[str, float]:
    """Acc@1, Acc@5 and recall@10 of each pair's item among those of all the pairs."""
    encoder.eval()
    device = next(encoder.parameters()).device
    query = encode(encoder, contents, pairs.query_P, device=device)
    item = encode(encoder, contents, pairs.item_P, text_C=pairs.item_text_P, device=device)
    return retrieval_metrics(query, item)


@torch.no_grad()
def encode(
    encoder: nn.Module,
    contents: Contents,
    rows_C: np.ndarray,
    *,
    text_C: np.ndarray | None = None,
    device: torch.device,
) -> Tensor:
    """Unit x_CD of content rows, block by block."""
    parts = []
    for start in range(0, len(rows_C), EVAL_ROWS):
        block = slice(start, start + EVAL_ROWS)
        inputs = contents.inputs(rows_C[block], None if text_C is None else text_C[block])
        parts.append(encoder({name: tensor.to(device) for name, tensor in inputs.items()}))
    return torch.cat(parts).float()


def split_by_group(pairs: PairRows, *, share: float, most: int, seed: int) -> Split:
    """Hold out a share of the title groups, one pair of each, at most `most`.

    An item without a title is a group of its own.
    """
    group_P = pairs.group_C[pairs.item_P]
    # Items without a title are groups of their own, numbered below zero.
    group_P = np.where(group_P < 0, -2 - pairs.item_id_C[pairs.item_P], group_P)
    groups = np.unique(group_P)
    held = np.random.default_rng(seed).permutation(groups)[: int(share * len(groups))]
    is_held_P = np.isin(group_P, held)
    _, first = np.unique(group_P[is_held_P], return_index=True)
    valid = np.flatnonzero(is_held_P)[np.sort(first)]
    if len(valid) > most:
        valid = np.sort(np.random.default_rng([seed, 1]).choice(valid, most, replace=False))
    return Split(pairs.take(np.flatnonzero(~is_held_P)), pairs.take(valid))
