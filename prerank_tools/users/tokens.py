"""Event tokens: what a user did, with which item, where and when, as one vector an event; and query tokens.

LLaTTE (arXiv 2601.20083): x_t = MLP(type, item, surface, time, meta), frozen content embeddings among the
item features, and a timestamp code added to part of the width in place of rotary positions.
"""

# B users, T events, C content dims, M meta numbers, F user and context numbers, d width

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

HOUR, DAY, WEEK = 3600.0, 86400.0, 604800.0
META = 2  # log1p(value), log1p(duration)
USER_FEATURES = 12


class Events(NamedTuple):
    """A padded batch of histories, oldest first; padding stands on the left and is false in `mask`."""

    item_BT: Tensor  # int64, hashed id, 0 where unknown
    content_BTC: Tensor  # frozen item embedding, zeros where the item has none
    action_BT: Tensor  # int64, place in the vocabulary, 0 where unknown
    surface_BT: Tensor
    meta_BTM: Tensor
    time_BT: Tensor  # int64 epoch seconds
    mask_BT: Tensor  # bool
    user_BF: Tensor  # user and context features, never the target's


@dataclass(frozen=True)
class TokenSizes:
    """How large the tables and parts of an event token are."""

    content: int
    item_buckets: int
    actions: int  # unknown included
    surfaces: int
    part: int = 32  # width of the parts that are concatenated


class EventTokens(nn.Module):
    """Events -> tokens (B, T, d)."""

    def __init__(self, sizes: TokenSizes, width: int) -> None:
        super().__init__()
        part = sizes.part
        self.action = nn.Embedding(sizes.actions, part)
        self.item = nn.Embedding(sizes.item_buckets + 1, part)
        self.surface = nn.Embedding(sizes.surfaces, part)
        self.content = nn.Linear(sizes.content, width)
        self.time = nn.Linear(5, part)
        self.meta = nn.Linear(META, part)
        self.mlp = nn.Sequential(nn.Linear(width + 5 * part, width), nn.SiLU(), nn.Linear(width, width))
        self.coded = width // 4 // 2 * 2
        for table in (self.action, self.item, self.surface):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, events: Events) -> Tensor:
        """(B, T, d); the code of time lies on the last quarter of the width."""
        age_BT = age_of(events)
        parts = [
            self.action(events.action_BT),
            self.item(events.item_BT),
            self.surface(events.surface_BT),
            self.content(rms(events.content_BTC)),
            self.time(clock(age_BT, events.time_BT, dtype=events.content_BTC.dtype)),
            self.meta(events.meta_BTM),
        ]
        x_BTd = self.mlp(torch.cat(parts, dim=-1))
        code = age_code(age_BT, self.coded).to(x_BTd.dtype)
        return torch.cat([x_BTd[..., : -self.coded], x_BTd[..., -self.coded :] + code], dim=-1)


class QueryTokens(nn.Module):
    """User and context features -> (B, n, d): learned tokens shifted by what is known of the user."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.shape = (tokens, width)
        self.learned = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.mlp = nn.Sequential(nn.Linear(USER_FEATURES, width), nn.SiLU(), nn.Linear(width, tokens * width))

    def forward(self, user_BF: Tensor) -> Tensor:
        return self.learned + self.mlp(user_BF).unflatten(-1, self.shape)


def rms(content: Tensor) -> Tensor:
    """Content embeddings at unit mean square: a unit vector's numbers would be too small to be heard."""
    return functional.rms_norm(content, content.shape[-1:])


def age_of(events: Events) -> Tensor:
    """Seconds between each event and the newest one (float64), the event that triggers a refresh.

    Ages count from the newest event and not from the request: the embedding is computed ahead of requests, so
    it must be a function of the history alone, and stays valid until the next event (ours).
    """
    newest_B1 = newest(events.time_BT, events.mask_BT)
    return torch.where(events.mask_BT, newest_B1 - events.time_BT, 0).double()


def newest(time_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(B, 1) time of the newest real event."""
    return torch.where(mask_BT, time_BT, torch.iinfo(torch.int64).min).amax(1, keepdim=True)


def clock(age_BT: Tensor, time_BT: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, T, 5): log age, then hour of day and day of week as points on circles."""
    day = 2 * math.pi * (time_BT.double() % DAY) / DAY
    week = 2 * math.pi * (time_BT.double() % WEEK) / WEEK
    parts = [age_BT.log1p() / 10, day.sin(), day.cos(), week.sin(), week.cos()]
    return torch.stack(parts, dim=-1).to(dtype)


def age_code(age_BT: Tensor, width: int) -> Tensor:
    """(B, T, width): sines and cosines of log1p(age) at geometric frequencies from 0.2 to 20."""
    frequency = torch.logspace(math.log10(0.2), math.log10(20), width // 2).to(age_BT)
    angle = age_BT.log1p()[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def user_features(count_B: Tensor, time_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(B, F) numbers about the user and the moment of the newest event; `count_B` counts cut-off events too.

    Log of the count, of the span and of the events within a day, week, month and quarter of the newest one,
    share of the events in the newest second, mean gap, hour and week of the newest event.
    """
    newest_B1 = newest(time_BT, mask_BT)
    age = torch.where(mask_BT, newest_B1 - time_BT, 0).double()
    within = [(mask_BT & (age < days * DAY)).sum(1).double().log1p() for days in (1, 7, 30, 90)]
    seen = mask_BT.sum(1).clamp(min=1).double()
    span = age.amax(1)
    newest_share = (mask_BT & (age == 0)).sum(1) / seen
    moment = clock(torch.zeros_like(newest_B1, dtype=torch.float64), newest_B1)[:, 0, 1:].double()
    numbers = [count_B.double().log1p(), span.log1p() / 10, *within, newest_share, (span / seen).log1p() / 10]
    return torch.cat([torch.stack(numbers, dim=-1), moment], dim=-1).float()
