"""SCL pre-training of an item encoder: query against bought item, negatives from a momentum bank (MUSE)."""

# B pairs of this rank, N pairs of all ranks, K bank rows, D dims

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prerank_tools.encoders.neighbours import NeighbourTerm
from prerank_tools.training.gather import first_row, gather_rows, row_counts
from prerank_tools.training.losses import info_nce, triplet

PAPER_BANK = 196_800
NO_GROUP = -1


class SclConfig(BaseModel):
    """SCL's knobs. The paper gives the bank, the loss and a learnable tau; the other values are ours."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bank: int | None = Field(default=None, ge=0)  # keys; None: min(196,800, half the items); 0: in-batch only
    momentum: float = Field(default=0.999, ge=0, lt=1)
    momentum_warmup: bool = True  # m_t = min(m, (1 + t) / (10 + t)): a fresh head moves fast at first
    temperature: float = Field(default=0.07, ge=0.01, le=1)  # where it starts
    learn_temperature: bool = True  # clamped to [1/100, 1]
    bank_weight: float = Field(default=0.2, ge=0, le=1)  # of the bank in L_nce, the rest is in-batch
    symmetric: bool = True  # item -> query as well, with a bank of its own
    triplet_weight: float = Field(default=0.5, ge=0)
    margin: float = Field(default=0.2, ge=0)


def bank_size(config: SclConfig, items: int, batch_size: int) -> tuple[int, str]:
    """Rows of the bank, and a warning where the configured size was cut (else "").

    At most one key an item is worth keeping, half the items by default; and the oldest key is
    `bank / batch` steps old, which the momentum encoder bridges for about 1 / (1 - m) steps.
    """
    fresh = round(batch_size / (1 - config.momentum))
    wanted = min(PAPER_BANK, items // 2) if config.bank is None else config.bank
    if wanted <= fresh:
        return wanted, ""
    return fresh, f"bank of {wanted} keys cut to {fresh}: momentum {config.momentum} keeps no more fresh"


class Bank(nn.Module):
    """The last K keys, first in first out, each with the item and the group (equal titles) it belongs to."""

    keys_KD: Tensor
    items_K: Tensor
    groups_K: Tensor
    cursor: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys_KD", torch.zeros(size, dim))
        self.register_buffer("items_K", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("groups_K", torch.full((size,), NO_GROUP))
        self.register_buffer("cursor", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros(1, dtype=torch.int64))

    def __len__(self) -> int:
        return int(self.filled)

    @torch.no_grad()
    def enqueue(self, keys_ND: Tensor, items_N: Tensor, groups_N: Tensor) -> None:
        """Overwrite the oldest rows; any number of new ones, the last K of them stay."""
        size = len(self.keys_KD)
        keys_ND, items_N, groups_N = keys_ND[-size:], items_N[-size:], groups_N[-size:]
        rows = (int(self.cursor) + torch.arange(len(keys_ND), device=keys_ND.device)) % size
        self.keys_KD[rows] = keys_ND.to(self.keys_KD.dtype)
        self.items_K[rows], self.groups_K[rows] = items_N, groups_N
        self.cursor.copy_((self.cursor + len(rows)) % size)
        self.filled.copy_((self.filled + len(rows)).clamp(max=size))

    def content(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, items and groups of the rows filled so far."""
        filled = len(self)
        return self.keys_KD[:filled], self.items_K[:filled], self.groups_K[:filled]


class Scl(nn.Module):
    """An encoder under training: `forward` gives the loss, `after_step` moves momentum encoder and bank.

    `encoder(inputs)` maps a dict of tensors to unit x_BD. A batch holds `query` and `item` (encoder inputs),
    `item_id` and `group` (int64, -1: none), and optionally `hard` (encoder inputs) with `has_hard` (bool),
    and `whole` (encoder inputs) with `space`, the items' rows of `neighbour_space`, zero where there is none.
    """

    steps: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        dim: int,
        bank: int,
        config: SclConfig | None = None,
        neighbours: NeighbourTerm | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or SclConfig()
        self.encoder = encoder
        self.neighbours = neighbours
        self.log_scale = nn.Parameter(
            torch.tensor(-math.log(config.temperature)), requires_grad=config.learn_temperature
        )
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.momentum = copy.deepcopy(encoder).requires_grad_(False) if bank else None
        self.item_bank = Bank(bank, dim) if bank else None
        self.query_bank = Bank(bank, dim) if bank and config.symmetric else None
        self._fresh: tuple[Tensor, ...] | None = None  # keys of the last batch, to be banked after its step

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """L = L_nce + lambda * L_triplet over this rank's pairs, with every rank's pairs as negatives.

        With `whole` in the batch the neighbour term is added; it brings its own weight.
        L_nce has two terms (ours): in-batch, where both sides learn, and against the bank, where the
        positive is the momentum encoder's key as well. A positive from the trained encoder among momentum
        negatives runs away from them, query and item together, and nothing is learnt (measured).
        """
        query_BD, item_BD = self.encoder(batch["query"]), self.encoder(batch["item"])
        in_batch, hits_B = self._both_ways(query_BD, item_BD, (query_BD, item_BD), batch, banks=(None, None))
        out = {"nce": in_batch, "hits": hits_B.float().mean(), "temperature": (-self.log_scale).exp()}
        if self.momentum is not None:
            with torch.no_grad():
                slow = self.momentum(batch["query"]), self.momentum(batch["item"])
            self._fresh = (*slow, batch["item_id"], batch["group"])
            banks = self.query_bank, self.item_bank
            out["nce_bank"], _ = self._both_ways(query_BD, item_BD, slow, batch, banks=banks)
            out["nce"] = torch.lerp(in_batch, out["nce_bank"], self.config.bank_weight)
        out["loss"] = out["nce"]
        if "hard" in batch and self.config.triplet_weight:
            out["triplet"] = self._triplet(query_BD, item_BD, batch)
            out["loss"] = out["loss"] + self.config.triplet_weight * out["triplet"]
        if "whole" in batch and self.neighbours is not None:
            out["neighbours"] = self.neighbours(self.encoder(batch["whole"]), batch["space"])
            out["loss"] = out["loss"] + out["neighbours"]
        return {**out, "weight": torch.tensor(float(len(query_BD)))}

    def _both_ways(
        self,
        query_BD: Tensor,
        item_BD: Tensor,
        keys: tuple[Tensor, Tensor],
        batch: Mapping[str, Any],
        *,
        banks: tuple[Bank | None, Bank | None],
    ) -> tuple[Tensor, Tensor]:
        """InfoNCE of query -> item keys and, if symmetric, back; `keys` and `banks` as (query, item)."""
        loss, hits_B = self._nce(query_BD, keys[1], batch, banks[1])
        if self.config.symmetric:
            loss = (loss + self._nce(item_BD, keys[0], batch, banks[0])[0]) / 2
        return loss, hits_B

    def _nce(
        self, query_BD: Tensor, key_BD: Tensor, batch: Mapping[str, Any], bank: Bank | None
    ) -> tuple[Tensor, Tensor]:
        """InfoNCE of one direction over all ranks' keys and the bank's, and which queries hit their own."""
        keys_ND, items_N, groups_N = (gather_rows(x) for x in (key_BD, batch["item_id"], batch["group"]))
        own_B = torch.arange(len(query_BD), device=query_BD.device) + first_row(row_counts(key_BD))
        if bank is not None:
            old_keys, old_items, old_groups = bank.content()
            keys_ND = torch.cat([keys_ND, old_keys.to(keys_ND.dtype)])
            items_N, groups_N = torch.cat([items_N, old_items]), torch.cat([groups_N, old_groups])
        cosine_BN = cosines(query_BD, keys_ND)
        masked_BN = same_content(batch["item_id"], items_N, batch["group"], groups_N)
        loss = info_nce(cosine_BN * self.log_scale.exp(), own_B, masked_BN=masked_BN)
        return loss, cosine_BN.detach().argmax(1) == own_B

    def _triplet(self, query_BD: Tensor, item_BD: Tensor, batch: Mapping[str, Any]) -> Tensor:
        hard_BD = self.encoder(batch["hard"])
        positive_B, negative_B = (query_BD * item_BD).sum(1), (query_BD * hard_BD).sum(1)
        return triplet(positive_B, negative_B, margin=self.config.margin, valid_B=batch["has_hard"])

    @torch.no_grad()
    def after_step(self) -> None:
        """Clamp the temperature; bank the batch's keys; let the momentum encoder follow."""
        self.log_scale.clamp_(0.0, math.log(100.0))
        if self.momentum is None or self._fresh is None:
            return
        query_ND, item_ND, items_N, groups_N = (gather_rows(x) for x in self._fresh)
        for bank, keys_ND in ((self.item_bank, item_ND), (self.query_bank, query_ND)):
            if bank is not None:
                bank.enqueue(keys_ND, items_N, groups_N)
        self._fresh = None
        self._follow()

    def _follow(self) -> None:
        step = int(self.steps)
        warm = (1 + step) / (10 + step) if self.config.momentum_warmup else 1.0
        rate = min(self.config.momentum, warm)
        assert self.momentum is not None
        for slow, fast in zip(self.momentum.parameters(), self.encoder.parameters(), strict=True):
            if fast.requires_grad:
                slow.lerp_(fast.detach(), 1 - rate)
        self.steps += 1

    def train(self, mode: bool = True) -> Scl:
        """As nn.Module's, but BatchNorm keeps its running statistics: batch ones leak the positive."""
        super().train(mode)
        for module in batch_norms(self):
            module.eval()
        if self.momentum is not None:
            self.momentum.eval()
        return self


def cosines(x_BD: Tensor, y_ND: Tensor) -> Tensor:
    """Products in fp32 also under autocast: over a small temperature, bf16 would round logits by 0.3."""
    with torch.autocast(x_BD.device.type, enabled=False):
        return x_BD.float() @ y_ND.float().T


def same_content(items_B: Tensor, items_N: Tensor, groups_B: Tensor, groups_N: Tensor) -> Tensor:
    """True where a key is the query's own item, or another item of its group (equal title): no negative."""
    same_item = items_B[:, None] == items_N[None, :]
    same_group = (groups_B[:, None] == groups_N[None, :]) & (groups_B[:, None] != NO_GROUP)
    return same_item | same_group


def batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    """Every BatchNorm below `module`."""
    return (m for m in module.modules() if isinstance(m, _BatchNorm))
