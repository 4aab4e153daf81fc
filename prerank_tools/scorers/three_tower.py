"""Three-tower pre-ranker: a user tower once a request, a cached item tower, a small net per candidate.

The structure follows the course deck 03_Rank_06 (wangshusen/RecommenderSystem); sizes, the exact crosses and
the split are ours. The first upper layer is linear in the concatenation of the tower outputs, so its product
with each tower is taken where that tower runs: `a_u = W_u z_u + b` once a request, `a_i = W_i z_i` once an
item (this is what the cache holds), and only the narrow rest for every candidate. Exact up to float rounding.
"""

# B requests, n candidates over all requests, m distinct items, F features, C codes, K tasks
# h width of the first upper layer, x width of the match term
from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from prerank_tools.scorers.towers import CodeEmbeddings, InputScale, mlp


class ThreeTowerConfig(BaseModel):
    """Sizes of the towers (ours); `negative_rate` is the share of negatives that training keeps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    code_width: int = Field(default=8, ge=1)
    user_hidden: tuple[int, ...] = (64,)
    item_hidden: tuple[int, ...] = (64,)
    user_width: int = Field(default=32, ge=1)
    item_width: int = Field(default=16, ge=1)
    cross_width: int = Field(default=32, ge=1)
    match_width: int = Field(default=16, ge=1)
    upper: tuple[int, ...] = Field(default=(64, 32), min_length=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)  # of the upper network
    # Of what the user and item towers read. A content vector names its item: on a few thousand requests the
    # towers learn items by heart, and the ranking inside a request suffers most. Lower it with more data.
    input_dropout: float = Field(default=0.8, ge=0, lt=1)
    negative_rate: float = Field(default=1.0, gt=0, le=1)


class InputShape(BaseModel):
    """What the data decide: widths of the input blocks by name, sizes of the code books, tasks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    user_blocks: dict[str, int]
    item_blocks: dict[str, int]
    cross_blocks: dict[str, int]
    code_sizes: dict[str, int]
    tasks: tuple[str, ...]


class ThreeTower(nn.Module):
    """The model; `forward` trains on packed requests, the three parts serve."""

    def __init__(self, shape: InputShape, config: ThreeTowerConfig) -> None:
        super().__init__()
        self.shape, self.config = shape, config
        user, item, cross = (
            sum(b.values()) for b in (shape.user_blocks, shape.item_blocks, shape.cross_blocks)
        )
        self.user_scale, self.item_scale, self.cross_scale = (
            InputScale(user),
            InputScale(item),
            InputScale(cross),
        )
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.codes = CodeEmbeddings(tuple(shape.code_sizes.values()), config.code_width)
        self.user_tower = mlp(user, config.user_hidden, config.user_width, norm=True)
        self.item_tower = mlp(item + self.codes.width, config.item_hidden, config.item_width, norm=True)
        self.cross_tower = nn.Sequential(nn.Linear(cross, config.cross_width), nn.ReLU())
        self.user_match = nn.Linear(config.user_width, config.match_width, bias=False)
        self.item_match = nn.Linear(config.item_width, config.match_width, bias=False)
        self.first = nn.Linear(sum(self.first_widths), config.upper[0])
        self.upper = nn.Sequential(nn.ReLU(), nn.Dropout(config.dropout), *_hidden(config.upper))
        self.heads = nn.Linear(config.upper[-1], len(shape.tasks))

    @property
    def first_widths(self) -> tuple[int, int, int, int, int]:
        """Widths of [z_u ; z_i ; z_c ; P_u z_u * P_i z_i ; <P_u z_u, P_i z_i>], what `first` reads."""
        c = self.config
        return c.user_width, c.item_width, c.cross_width, c.match_width, 1

    @property
    def record_width(self) -> int:
        """Floats the item cache holds for an item."""
        return self.config.upper[0] + self.config.match_width

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss over a pack: user_BF, item_mF, codes_mC, item_of_n, request_of_n, cross_nF, label_nK."""
        logit_nK = self.logits(batch)
        label_nK = batch["label_nK"]
        known_nK = ~torch.isnan(label_nK)  # a like is only asked for where there was a click
        bce_nK = F.binary_cross_entropy_with_logits(logit_nK, label_nK.nan_to_num(), reduction="none")
        weight = known_nK.sum()
        return {"loss": (bce_nK * known_nK).sum() / weight.clamp_min(1), "weight": weight.double()}

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [n, K] of a pack, by the same three parts that serve: nothing can differ between them."""
        user_Bhx = self.user_part(batch["user_BF"])
        item_mhx = self.item_part(batch["item_mF"], batch["codes_mC"])
        request_n, item_n = batch["request_of_n"], batch["item_of_n"]
        return self.candidate_part(user_Bhx, request_n, item_mhx.index_select(0, item_n), batch["cross_nF"])

    def user_part(self, user_BF: Tensor) -> Tensor:
        """[W_u z_u + b ; P_u z_u], [B, h + x]: once a request."""
        z_u = self.user_tower(self.input_dropout(self.user_scale(user_BF)))
        return torch.cat([F.linear(z_u, self._first("user"), self.first.bias), self.user_match(z_u)], dim=1)

    def item_part(self, item_mF: Tensor, codes_mC: Tensor) -> Tensor:
        """[W_i z_i ; P_i z_i], [m, h + x]: once an item, and then from the cache."""
        item_in = torch.cat([self.item_scale(item_mF), self.codes(codes_mC)], dim=1)
        z_i = self.item_tower(self.input_dropout(item_in))
        return torch.cat([F.linear(z_i, self._first("item")), self.item_match(z_i)], dim=1)

    def candidate_part(
        self, user_Bhx: Tensor, request_n: Tensor, item_nhx: Tensor, cross_nF: Tensor
    ) -> Tensor:
        """Cross tower and upper network, [n, K] logits: for every candidate."""
        h = self.config.upper[0]
        user_nhx = user_Bhx.index_select(0, request_n)
        match_nx = user_nhx[:, h:] * item_nhx[:, h:]
        z_c = self.cross_tower(self.cross_scale(cross_nF))
        # the inner product is a sum over the match term: its one column of W folds into the others
        match_weight = self._first("match") + self._first("inner")
        first_nh = user_nhx[:, :h] + item_nhx[:, :h] + F.linear(z_c, self._first("cross"))
        return self.heads(self.upper(first_nh + F.linear(match_nx, match_weight)))

    def _first(self, part: str) -> Tensor:
        index = ("user", "item", "cross", "match", "inner").index(part)
        return self.first.weight.split(self.first_widths, dim=1)[index]

    @torch.no_grad()
    def fit_inputs(self, user_BF: Tensor, item_mF: Tensor, cross_nF: Tensor, label_nK: Tensor) -> None:
        """Set the scaling buffers from the training data and the heads' bias to the base rates."""
        self.user_scale.fit_blocks(user_BF, tuple(self.shape.user_blocks.values()))
        self.item_scale.fit_blocks(item_mF, tuple(self.shape.item_blocks.values()))
        self.cross_scale.fit_columns(cross_nF)
        rate_K = label_nK.double().nanmean(0).nan_to_num(0.5).clamp(1e-4, 1 - 1e-4)
        self.heads.bias.copy_(torch.logit(rate_K))

    def multiply_adds(self) -> dict[str, int]:
        """Multiply-adds of a row of each part; a request costs user + misses * item + n * candidate."""
        h, c = self.config.upper[0], self.config
        return {
            "user": _linear_size(self.user_tower) + c.user_width * (h + c.match_width),
            "item": _linear_size(self.item_tower) + c.item_width * (h + c.match_width),
            "candidate": _linear_size(self.cross_tower, self.upper, self.heads)
            + h * (c.cross_width + c.match_width),
        }


def _hidden(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers


def _linear_size(*modules: nn.Module) -> int:
    linears = [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(layer.weight.numel() for layer in linears)
