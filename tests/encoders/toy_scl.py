"""A tiny SCL training over fixed features, also run as a script under torchrun by test_moco.py."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prerank_tools.encoders.moco import Scl, SclConfig
from prerank_tools.encoders.neighbours import NeighbourTerm
from prerank_tools.training.batches import ShuffledRows
from prerank_tools.training.loop import TrainConfig, train

ROWS = 21  # batches of 8, 8 and 5: the last one ragged, and odd between two ranks


class Linear(nn.Module):
    """Unit x_BD from raw rows."""

    def __init__(self, width: int = 6, dim: int = 4) -> None:
        super().__init__()
        self.project = nn.Linear(width, dim)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.normalize(self.project(inputs["x"]), dim=-1)


def scl(bank: int = 16, **knobs: Any) -> Scl:
    torch.manual_seed(3)
    return Scl(Linear(), dim=4, bank=bank, config=SclConfig(**knobs), neighbours=NeighbourTerm())


def pairs(kill_at: int = -1) -> ShuffledRows:
    table = torch.randn(3, ROWS, 6, generator=torch.Generator().manual_seed(0))
    calls = iter(range(10**6))

    def make(rows_B: np.ndarray) -> dict[str, Any]:
        if next(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        rows = torch.from_numpy(rows_B)
        return {
            "query": {"x": table[0, rows]},
            "item": {"x": table[0, rows] + 0.1 * table[1, rows]},
            "hard": {"x": table[2, rows]},
            "has_hard": rows % 3 == 0,
            "item_id": rows // 2,
            "whole": {"x": table[1, rows]},
            "space": nn.functional.normalize(table[2, rows] * (rows % 4 != 1)[:, None], dim=-1),
            "group": torch.where(rows % 5 == 0, 0, -1),
        }

    return ShuffledRows(ROWS, make, 8)


def main(folder: Path, kill_at: int = -1, bank: int = 64) -> None:
    torch.set_num_threads(1)
    model = scl(bank=bank)
    config = TrainConfig(epochs=2, batch_size=8, lr=0.02, checkpoint_every=2)
    train(model, pairs(kill_at), config=config, folder=folder)
    if os.environ.get("RANK", "0") == "0":
        from safetensors.torch import save_file

        save_file(model.state_dict(), str(folder / "final.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
