"""Training curves for TensorBoard, which is loaded only where a folder for them is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prerank_tools.errors import UsageError

HINT = "pip install 'prerank[tensorboard]'"


def check_board(folder: Path | None) -> None:
    """Refuse, before anything is read, a board that cannot be written."""
    if folder is not None:
        _writer_class()


def with_board(log: Callable[..., None], folder: Path | None) -> Callable[..., None]:
    """A training's `log` that draws the numbers of every epoch under `folder` as well."""
    return log if folder is None else _Board(log, folder)


class _Board:
    def __init__(self, log: Callable[..., None], folder: Path) -> None:
        self.log, self.folder = log, folder
        self.writer: Any = None
        self.resumed: int | None = None

    def __call__(self, event: str, **fields: Any) -> None:
        self.log(event, **fields)
        if event == "resumed":
            self.resumed = int(fields["step"])
        if event != "epoch":
            return
        if self.writer is None:
            # What a killed run drew past its last checkpoint is drawn again, and not twice.
            purge = None if self.resumed is None else self.resumed + 1
            self.writer = _writer_class()(log_dir=str(self.folder), purge_step=purge)
        for name, value in fields.items():
            if name not in ("epoch", "step", "seconds"):
                self.writer.add_scalar(name, value, fields["step"])
        self.writer.flush()


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as fault:
        raise UsageError("--tensorboard: tensorboard is not installed", HINT) from fault
    return SummaryWriter
