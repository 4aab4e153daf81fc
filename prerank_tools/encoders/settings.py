"""Knobs of the encoders as config sections; the maths files take plain numbers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TextConfig(BaseModel):
    """How texts become vectors; `token_budget` is about speed alone, the others about the space."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pooling: Literal["auto", "mean", "cls", "last"] = "auto"  # auto: what the model folder says, else mean
    max_tokens: int = Field(default=256, ge=4)  # longer texts are cut; the model's own limit may be lower
    token_budget: int = Field(default=4096, ge=64)  # tokens in one forward pass; a GPU takes 8 times as many


class ImageConfig(BaseModel):
    """How images become vectors; `batch` is about speed alone, the limits about faults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pooling: Literal["auto", "pooler", "cls", "mean"] = "auto"  # auto: pooler where trained, cls, or mean
    batch: int = Field(default=32, ge=1)  # images in one forward pass; a GPU takes 8 times as many
    max_pixels: int = Field(default=64_000_000, ge=1)  # larger ones are refused before they are decoded
    max_bytes: int = Field(default=64 << 20, ge=1)
