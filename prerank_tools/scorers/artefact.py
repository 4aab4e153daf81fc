"""A scorer's folder: `config.json` says what it reads and how wide it is, beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_model, save_model

from prerank_tools.errors import ContractError
from prerank_tools.scorers.three_tower import InputShape, ThreeTower, ThreeTowerConfig


class InputConfig(BaseModel):
    """What the scorer reads (ours). `numbers` and `categories` are columns of the items table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    history: int = Field(default=50, ge=0)  # newest behaviours in the mean content vector; 0: none
    simtier: bool = True
    gsu_k: int = Field(default=50, ge=1)
    numbers: tuple[str, ...] = ()
    categories: tuple[str, ...] = ("category",)
    category_words: int = Field(default=1000, ge=1)  # the most frequent ones
    lag: int = Field(default=0, ge=0)


class ScorerSpec(BaseModel):
    """Everything but the weights that scoring must repeat from training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scorer: Literal["three_tower"] = "three_tower"
    model: ThreeTowerConfig
    inputs: InputConfig
    shape: InputShape
    content: int  # dims of the item embeddings
    user: int  # dims of the user embeddings; 0: trained without
    levels: int  # SID levels; 0: trained without
    vocabularies: dict[str, tuple[str, ...]]  # category column -> words in the order of their codes


def save(folder: Path, spec: ScorerSpec, model: ThreeTower) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(spec.model_dump(mode="json"), indent=1, ensure_ascii=False)
    )
    save_model(model, str(folder / "model.safetensors"))


def read_spec(folder: Path) -> ScorerSpec:
    """The spec of a scorer's folder; ContractError where it is not one."""
    try:
        return ScorerSpec.model_validate_json((folder / "config.json").read_text())
    except (OSError, ValidationError) as fault:
        raise ContractError(
            f"{folder}: not a scorer ({str(fault).splitlines()[0]})",
            "prerank train scorer --requests R --events E --items I --embeddings EMB -o scorer/",
        ) from fault


def load(folder: Path, *, device: str = "cpu") -> tuple[ScorerSpec, ThreeTower]:
    """Spec and model, in evaluation mode on `device`."""
    spec = read_spec(folder)
    model = ThreeTower(spec.shape, spec.model)
    load_model(model, str(folder / "model.safetensors"), strict=True)
    return spec, model.to(device).eval()
