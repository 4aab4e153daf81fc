"""Fusion: one unit vector from an item's text and image vectors, either of which may be missing."""

# B items, T text dims, I image dims, D output dims, S tokens (summary, text, image)

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import normalize

Kind = Literal["concat", "gated", "cross_modal", "residual"]


class FusionConfig(BaseModel):
    """Shape of a fusion: `concat` (projected), `gated` sum, `cross_modal` transformer, or `residual`.

    Defaults, and `residual`, are ours.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind = "concat"
    text_dim: int = Field(ge=0)  # 0: the encoder has no such tower; `concat` is then a linear head
    image_dim: int = Field(ge=0)
    dim: int = Field(default=128, gt=0)
    hidden: int = Field(default=256, gt=0)  # width inside `cross_modal` and `residual`
    layers: int = Field(default=2, gt=0)
    heads: int = Field(default=4, gt=0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)


def build_fusion(config: FusionConfig) -> Fusion:
    """The module that `config` names, freshly initialised."""
    kinds: dict[str, type[Fusion]] = {
        "concat": ConcatProjection,
        "gated": GatedSum,
        "cross_modal": CrossModal,
        "residual": Residual,
    }
    return kinds[config.kind](config)


def concat_unit(text_BT: Tensor, image_BI: Tensor, has_text_B: Tensor, has_image_B: Tensor) -> Tensor:
    """Fusion without weights: each modality normalised, a missing one zero, the pair of unit length.

    The cosine of two such items is the mean of their text and image cosines; both halves weigh the same
    whatever their widths.
    """
    text_BT = normalize(text_BT, dim=-1) * has_text_B[:, None]
    image_BI = normalize(image_BI, dim=-1) * has_image_B[:, None]
    return normalize(torch.cat([text_BT, image_BI], dim=-1), dim=-1)


class Fusion(nn.Module):
    """What the fusions share: unit inputs, and a learned placeholder where a modality is missing (ours)."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        self.no_text_T = nn.Parameter(torch.randn(config.text_dim) * max(config.text_dim, 1) ** -0.5)
        self.no_image_I = nn.Parameter(torch.randn(config.image_dim) * max(config.image_dim, 1) ** -0.5)

    def forward(self, text_BT: Tensor, image_BI: Tensor, has_text_B: Tensor, has_image_B: Tensor) -> Tensor:
        """Unit x_BD; `has_*_B` are booleans, and the rows they exclude are never read (NaN there is fine)."""
        text_BT = unit_or_placeholder(text_BT, has_text_B, self.no_text_T)
        image_BI = unit_or_placeholder(image_BI, has_image_B, self.no_image_I)
        return normalize(self.fuse(text_BT, image_BI, has_text_B & has_image_B), dim=-1)

    def fuse(self, text_BT: Tensor, image_BI: Tensor, whole_B: Tensor) -> Tensor:
        """x_BD before normalisation; `whole_B`: both modalities are there."""
        raise NotImplementedError


class ConcatProjection(Fusion):
    """A linear map of the two vectors side by side."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(config)
        self.project = nn.Linear(config.text_dim + config.image_dim, config.dim)

    def fuse(self, text_BT: Tensor, image_BI: Tensor, whole_B: Tensor) -> Tensor:
        return self.project(torch.cat([text_BT, image_BI], dim=-1))


class GatedSum(Fusion):
    """g * text + (1 - g) * image in the output space, with a gate g in (0, 1) per dimension from both."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(config)
        self.project_text = nn.Linear(config.text_dim, config.dim)
        self.project_image = nn.Linear(config.image_dim, config.dim)
        self.gate = nn.Linear(config.text_dim + config.image_dim, config.dim)

    def fuse(self, text_BT: Tensor, image_BI: Tensor, whole_B: Tensor) -> Tensor:
        gate_BD = torch.sigmoid(self.gate(torch.cat([text_BT, image_BI], dim=-1)))
        return gate_BD * self.project_text(text_BT) + (1 - gate_BD) * self.project_image(image_BI)


class Residual(Fusion):
    """As `concat`, and for whole items an MLP over both projections is added (ours).

    A title alone and a picture alone keep one linear map each, so that they find each other; what a whole
    item is near to may weigh the two by their content.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(config)
        self.project_text = nn.Linear(config.text_dim, config.dim)
        self.project_image = nn.Linear(config.image_dim, config.dim)
        self.mix = nn.Sequential(
            nn.Linear(2 * config.dim, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.dim)
        )

    def fuse(self, text_BT: Tensor, image_BI: Tensor, whole_B: Tensor) -> Tensor:
        text_BD, image_BD = self.project_text(text_BT), self.project_image(image_BI)
        mixed_BD = self.mix(torch.cat([text_BD, image_BD], dim=-1))
        return text_BD + image_BD + torch.where(whole_B[:, None], mixed_BD, 0.0)


class CrossModal(Fusion):
    """A small pre-norm transformer over (summary, text, image); the summary token is the item."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(config)
        self.project_text = nn.Linear(config.text_dim, config.hidden)
        self.project_image = nn.Linear(config.image_dim, config.hidden)
        self.summary_H = nn.Parameter(torch.randn(config.hidden) * 0.02)
        self.kind_SH = nn.Parameter(torch.randn(3, config.hidden) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.hidden,
            config.heads,
            4 * config.hidden,
            config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(
            layer, config.layers, norm=nn.LayerNorm(config.hidden), enable_nested_tensor=False
        )
        self.project = nn.Linear(config.hidden, config.dim)

    def fuse(self, text_BT: Tensor, image_BI: Tensor, whole_B: Tensor) -> Tensor:
        tokens = [
            self.summary_H.expand(len(text_BT), -1),
            self.project_text(text_BT),
            self.project_image(image_BI),
        ]
        x_BSH = torch.stack(tokens, dim=1) + self.kind_SH
        return self.project(self.blocks(x_BSH)[:, 0])


def unit_or_placeholder(x_BD: Tensor, has_B: Tensor, placeholder_D: Tensor) -> Tensor:
    """Unit rows of x where `has_B`, the placeholder elsewhere; no gradient reaches an absent row."""
    # Zeroed before the norm as well: the gradient of NaN / NaN would pass through a single `where`.
    x_BD = normalize(torch.where(has_B[:, None], x_BD, 0.0), dim=-1)
    return torch.where(has_B[:, None], x_BD, placeholder_D.to(x_BD.dtype))
