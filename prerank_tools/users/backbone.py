"""The part that only training sees: a DHEN-like backbone over summaries and a candidate, with a head a task.

LLaTTE trains its user model end to end under such a backbone (figure 1, "training only"); the layer follows
DHEN (arXiv 2203.11014): several interactions of the same tokens, summed, a short cut, a norm.
"""

# B users, K candidates, S summaries, R rows B*K, m tokens, w width, H heads

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from prerank_tools.users.batches import TrainBatch
from prerank_tools.users.llatte import UserModel
from prerank_tools.users.tokens import rms


class DhenLayer(nn.Module):
    """Norm(x + dot(x) + attention(x) + cross(x) + mix(x)) over (R, m, w)."""

    pairs: Tensor

    def __init__(self, tokens: int, width: int, *, rank: int = 32) -> None:
        super().__init__()
        self.register_buffer("pairs", torch.triu_indices(tokens, tokens, 1), persistent=False)
        self.dot = nn.Linear(tokens * (tokens - 1) // 2, tokens * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.cross_down = nn.Linear(tokens * width, rank, bias=False)
        self.cross_up = nn.Linear(rank, tokens * width)
        self.mix = nn.Linear(tokens, tokens)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_Rmw: Tensor) -> Tensor:
        flat = x_Rmw.flatten(1)
        dots = (x_Rmw @ x_Rmw.transpose(1, 2) / x_Rmw.shape[2] ** 0.5)[:, self.pairs[0], self.pairs[1]]
        query, key, value = self.qkv(x_Rmw).chunk(3, dim=-1)
        attended = functional.scaled_dot_product_attention(query, key, value)
        mixed = self.mix(x_Rmw.transpose(1, 2)).transpose(1, 2)
        joined = self.dot(dots) + flat * self.cross_up(self.cross_down(flat))
        return self.norm(x_Rmw + attended + mixed + joined.view_as(x_Rmw))


class Backbone(nn.Module):
    """Summaries (B, S, s) and candidates (B, K), content at unit mean square -> logits (B, K, H)."""

    def __init__(
        self, model: UserModel, *, content: int, part: int, heads: int, layers: int, width: int
    ) -> None:
        super().__init__()
        config = model.config
        tokens = config.summaries + 2
        self.summary = nn.Linear(config.summary_width, width)
        self.item, self.content = nn.Linear(part, width), nn.Linear(content, width)
        self.place = nn.Parameter(torch.zeros(tokens, width))
        self.layers = nn.ModuleList(DhenLayer(tokens, width) for _ in range(layers))
        # A dot product in the items' own space: the plainest thing a summary can learn is a taste.
        self.taste = nn.Linear(config.summaries * config.summary_width, heads * content)
        self.heads = nn.Sequential(
            nn.Linear(tokens * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, heads)
        )

    def forward(self, summary_BSs: Tensor, item_BKp: Tensor, content_BKC: Tensor) -> Tensor:
        candidates = content_BKC.shape[1]
        user_BKSw = self.summary(summary_BSs)[:, None].expand(-1, candidates, -1, -1)
        item_BK2w = torch.stack([self.item(item_BKp), self.content(content_BKC)], dim=2)
        x_Rmw = (torch.cat([user_BKSw, item_BK2w], dim=2) + self.place).flatten(0, 1)
        for layer in self.layers:
            x_Rmw = layer(x_Rmw)
        taste_BHC = self.taste(summary_BSs.flatten(1)).unflatten(1, (-1, content_BKC.shape[2]))
        match_BKH = content_BKC @ taste_BHC.transpose(1, 2) / content_BKC.shape[2] ** 0.5
        return self.heads(x_Rmw.flatten(1)).unflatten(0, (-1, candidates)) + match_BKH


class Training(nn.Module):
    """User model and backbone under one loss: weighted binary cross-entropy summed over the heads."""

    head_weights: Tensor

    def __init__(self, user: UserModel, backbone: Backbone, head_weights: tuple[float, ...]) -> None:
        super().__init__()
        self.user, self.backbone = user, backbone
        self.register_buffer("head_weights", torch.tensor(head_weights), persistent=False)

    def forward(self, batch: TrainBatch) -> dict[str, Tensor]:
        loss_BKH = functional.binary_cross_entropy_with_logits(
            self.logits(batch), batch.label_BKH, reduction="none"
        )
        weight = batch.weight_BK.sum()
        loss = (loss_BKH @ self.head_weights * batch.weight_BK).sum() / weight.clamp(min=1)
        return {"loss": loss, "weight": weight}

    def logits(self, batch: TrainBatch) -> Tensor:
        """(B, K, H) before the sigmoid."""
        item_BKp = self.user.events.item(batch.item_BK)
        return self.backbone(self.user(batch.events), item_BKp, rms(batch.content_BKC))
