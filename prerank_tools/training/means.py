"""Means of what the model returns over an epoch, weighted by rows, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator


class RunningMeans:
    """Weighted sums on each rank, folded into rank 0 when a checkpoint or an epoch ends."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.totals: dict[str, torch.Tensor] = {}

    def add(self, outputs: Mapping[str, Any], weight: torch.Tensor) -> None:
        """Add every scalar of one step, which is a mean over `weight` rows."""
        for name, value in outputs.items():
            if torch.is_tensor(value) and value.dim() == 0:
                term = value.detach().double() * weight
                self.totals[name] = self.totals[name] + term if name in self.totals else term
        self.totals["weight"] = self.totals.get("weight", self.scalar(0.0)) + weight

    def fold(self) -> dict[str, float]:
        """Sum the ranks into rank 0, the one whose state a checkpoint holds; the sums. Collective."""
        if not self.totals:
            return {}
        names = sorted(self.totals)
        stacked = self.accelerator.reduce(torch.stack([self.totals[name] for name in names]), "sum")
        summed = dict(zip(names, stacked.unbind(), strict=True))
        kept = summed if self.accelerator.is_main_process else {k: v * 0 for k, v in summed.items()}
        self.totals = kept
        return {name: float(value) for name, value in summed.items()}

    def resume(self, totals: Mapping[str, float]) -> None:
        """Go on from the sums of a checkpoint: they are rank 0's."""
        if self.accelerator.is_main_process:
            self.totals = {name: self.scalar(value) for name, value in totals.items()}

    def scalar(self, value: Any) -> torch.Tensor:
        """A float64 scalar on the device."""
        return torch.as_tensor(value, dtype=torch.float64, device=self.accelerator.device).detach()
