"""How to train, where batches come from, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field


class TrainConfig(BaseModel):
    """How to train; every key can change the result. Defaults are ours."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=256, ge=1)  # rows of all processes together
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    clip_norm: float = Field(default=1.0, ge=0)  # 0: no clipping
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 42
    # epochs without a new best before stopping; 0: never, keep the last
    patience: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=0, ge=0)  # steps; 0: at the end of each epoch only


class Batches(Protocol):
    """Where batches come from: the same ones for the same (seed, epoch), the same number on every rank."""

    def __len__(self) -> int:
        """Steps in an epoch."""
        ...

    def epoch(self, number: int, *, rank: int = 0, world: int = 1) -> Iterator[Any]:
        """This rank's batches of one epoch: tensors, or nested dicts, lists and tuples of them."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """What training came to: the best monitored value, and one record an epoch (on rank 0 only)."""

    steps: int
    epochs: int
    best: float
    best_epoch: int
    stopped_early: bool
    history: list[dict[str, float]]
