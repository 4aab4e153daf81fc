"""LLaTTE's upstream user model: a whole history in, a few summary vectors out, and nothing about the target.

arXiv 2601.20083: events and query tokens through latent-attention layers, trimmed like a pyramid towards the
newest rows, the last layer asked by the query tokens alone; their rows flattened, then low-rank MLPs.
"""

# B users, T events, n query tokens, d width, S summaries, s summary width

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from prerank_tools.users.mla import LatentAttention
from prerank_tools.users.tokens import Events, EventTokens, QueryTokens, TokenSizes


class LlatteConfig(BaseModel):
    """Shape of the model. Defaults are small (ours); `paper_like()` fits the published parameter counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: int = Field(default=2, ge=1)
    width: int = Field(default=64, ge=16, multiple_of=8)
    heads: int = Field(default=2, ge=1)
    head_width: int = Field(default=16, ge=1)
    query_rank: int = Field(default=32, ge=1)
    kv_rank: int = Field(default=32, ge=1)
    query_tokens: int = Field(default=4, ge=1)
    summaries: int = Field(default=4, ge=1)
    summary_width: int = Field(default=32, ge=1)
    summary_rank: int = Field(default=32, ge=1)
    norm: Literal["post", "pre"] = "post"
    # Event rows that survive each layer, newest first to stay; empty: all of them, none after the last layer.
    keep: tuple[int, ...] = ()
    item_buckets: int = Field(default=4096, ge=1)
    part: int = Field(default=16, ge=1)

    @classmethod
    def paper_like(cls) -> LlatteConfig:
        """L 4, d 256, h*d_k 64, latents 128 and 96, 16 summaries of 128 (section 1.4 and 1.6)."""
        return cls(
            layers=4, width=256, heads=4, head_width=16, query_rank=128, kv_rank=96, query_tokens=16,
            summaries=16, summary_width=128, summary_rank=64, item_buckets=1_000_000, part=32,
        )  # fmt: skip

    def rows_after(self, events: int) -> list[int]:
        """Rows (events and query tokens) that leave each layer."""
        kept = self.keep or (events,) * (self.layers - 1) + (0,)
        if len(kept) != self.layers or kept[-1] != 0 or list(kept) != sorted(kept, reverse=True):
            raise ValueError(f"keep must be {self.layers} falling numbers that end in 0, not {list(kept)}")
        return [self.query_tokens + min(rows, events) for rows in kept]


class GatedMLP(nn.Module):
    """W2(silu(W1 z) * W3 z) with hidden width d, as the published parameter counts say."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(z)) * self.up(z))


class Layer(nn.Module):
    """Latent attention and gated MLP with residuals, for the last `kept` rows only."""

    def __init__(self, config: LlatteConfig) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.attention = LatentAttention(
            config.width,
            heads=config.heads,
            head_width=config.head_width,
            query_rank=config.query_rank,
            kv_rank=config.kv_rank,
        )
        self.mlp = GatedMLP(config.width)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(config.width), nn.RMSNorm(config.width)

    def forward(self, x_BTd: Tensor, mask_BT: Tensor, *, kept: int) -> Tensor:
        if self.pre:
            z = x_BTd[:, -kept:] + self.attention(self.attention_norm(x_BTd), mask_BT, kept=kept)
            return z + self.mlp(self.mlp_norm(z))
        z = self.attention_norm(x_BTd[:, -kept:] + self.attention(x_BTd, mask_BT, kept=kept))
        return self.mlp_norm(z + self.mlp(z))


class Summaries(nn.Module):
    """Flattened query rows -> (B, S, s), each summary through its own low-rank MLP."""

    def __init__(self, config: LlatteConfig) -> None:
        super().__init__()
        flat, rank = config.query_tokens * config.width, config.summary_rank
        self.down = nn.Linear(flat, config.summaries * rank, bias=False)
        self.up = nn.Parameter(torch.empty(config.summaries, rank, config.summary_width))
        self.bias = nn.Parameter(torch.zeros(config.summaries, config.summary_width))
        nn.init.normal_(self.up, std=1 / math.sqrt(rank))
        self.shape = (config.summaries, rank)

    def forward(self, rows_Bnd: Tensor) -> Tensor:
        low_BSr = functional.silu(self.down(rows_Bnd.flatten(1)).unflatten(-1, self.shape))
        return torch.einsum("bsr,srw->bsw", low_BSr, self.up) + self.bias


class UserModel(nn.Module):
    """Histories -> summaries (B, S, s); flattened they are the user embedding."""

    def __init__(self, config: LlatteConfig, sizes: TokenSizes) -> None:
        super().__init__()
        config.rows_after(1)
        self.config = config
        self.events = EventTokens(sizes, config.width)
        self.queries = QueryTokens(config.query_tokens, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.RMSNorm(config.width) if config.norm == "pre" else nn.Identity()
        self.summaries = Summaries(config)

    def forward(self, events: Events) -> Tensor:
        x_BTd = torch.cat([self.events(events), self.queries(events.user_BF)], dim=1)
        mask_BT = functional.pad(events.mask_BT, (0, self.config.query_tokens), value=True)
        for layer, kept in zip(self.layers, self.config.rows_after(events.mask_BT.shape[1]), strict=True):
            x_BTd = layer(x_BTd, mask_BT, kept=kept)
            mask_BT = mask_BT[:, -kept:]
        return self.summaries(self.final_norm(x_BTd))

    def embed(self, events: Events) -> Tensor:
        """(B, S * s): one row a user."""
        return self.forward(events).flatten(1)
