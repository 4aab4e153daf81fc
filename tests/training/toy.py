"""A small model and its batches, also run as a script under torchrun by the loop's tests."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from prerank_tools.training.loop import TrainConfig, train

ROWS = 37  # 37 = 4 x 8 + 5: the last batch is ragged, and odd between two ranks


class Toy(nn.Module):
    """Regression with dropout and a buffer that remembers the last step, as a queue does."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        error = (self.body(batch["x"]).squeeze(1) - batch["y"]).square()
        return {"loss": error.mean(), "mae": error.sqrt().mean(), "weight": torch.tensor(float(len(error)))}

    def after_step(self) -> None:
        self.steps += 1


class Rows:
    """Shuffled rows of a fixed table; each rank takes every world-th row of a batch."""

    def __init__(self, batch_size: int = 8, *, kill_at: int = -1, stop_at: int = -1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS, 6, generator=generator)
        self.y = self.x.sum(1)
        self.batch_size, self.kill_at, self.stop_at = batch_size, kill_at, stop_at

    def __len__(self) -> int:
        return -(-ROWS // self.batch_size)

    def epoch(self, number: int, *, rank: int = 0, world: int = 1) -> Iterator[dict[str, torch.Tensor]]:
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(number))
        for step, rows in enumerate(order.split(self.batch_size)):
            if number * len(self) + step == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if number * len(self) + step == self.stop_at:
                raise KeyboardInterrupt
            mine = rows[rank::world]
            yield {"x": self.x[mine], "y": self.y[mine]}


def toy(dropout: float = 0.2) -> Toy:
    torch.manual_seed(1)
    return Toy(dropout)


def main(folder: Path, kill_at: int, dropout: float) -> None:
    torch.set_num_threads(1)
    config = TrainConfig(epochs=3, batch_size=8, lr=0.02, checkpoint_every=2, schedule="cosine")
    model = toy(dropout)
    train(model, Rows(kill_at=kill_at), config=config, folder=folder)
    if os.environ.get("RANK", "0") == "0":
        from safetensors.torch import save_file

        save_file(model.state_dict(), str(folder / "final.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
