"""Train any model: one loop on accelerate, from one CPU process to torchrun, that survives a kill.

The model computes its own loss: `model(batch)` returns {"loss": scalar, ...}. Other scalars it returns
are averaged into the metrics; `weight`, where given, says how many rows the loss is a mean of, so that
ragged batches count by their rows and two processes give the gradient of one. Optional methods:
`after_step()` runs after each optimiser step (momentum encoders, queues); `parameter_groups(lr,
weight_decay)` replaces the default split into decayed matrices and undecayed vectors.

Randomness inside a step (dropout) is a function of (seed, step, rank), and what a model wants kept must
be a parameter or a buffer; so a checkpoint holds all there is, and a killed run ends in the weights of an
undisturbed one, given equal threads, world size and `checkpoint_every`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast, send_to_device
from torch import nn

from prerank_tools.errors import ConflictError, PrerankError, UsageError
from prerank_tools.training import checkpoints
from prerank_tools.training.config import Batches, TrainConfig, TrainResult
from prerank_tools.training.means import RunningMeans
from prerank_tools.training.steps import accelerator, lr_factor, parameter_groups, step_seed


def train(
    model: nn.Module,
    batches: Batches,
    *,
    config: TrainConfig,
    folder: Path,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    monitor: str = "loss",
    mode: Literal["min", "max"] = "min",
    init_from: Path | None = None,
    device: str = "cpu",
    log: Callable[..., None] = lambda *_, **__: None,
) -> TrainResult:
    """Train `model` in place; `folder` gets `checkpoints/` and `metrics.jsonl`; a run found there goes on.

    `evaluate` runs on rank 0 after each epoch, in eval mode without gradients. `monitor` names one of its
    values, or a mean of what the model returned. With `patience` the best epoch's weights are restored at
    the end. `init_from` is an earlier model's folder or `model.safetensors`; embedding tables may have
    grown since. Called again on a finished folder, it restores the result and trains nothing.
    `log(message, **fields)` hears of every epoch.
    """
    if init_from is not None:
        log("initialised", path=str(init_from), **checkpoints.load_grown(model, init_from))
    loop = _Loop(model, batches, config, folder, evaluate, monitor, mode, device, log)
    loop.resume()
    while not loop.finished:
        loop.run_epoch()
    return loop.close()


@dataclass
class _Progress:
    """Where the run stands: everything besides tensors that a checkpoint must hold."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best: float = 0.0
    best_step: int = 0
    best_epoch: int = -1
    stale: int = 0  # epochs since the best
    totals: dict[str, float] = field(default_factory=dict)  # weighted sums of this epoch so far
    history: list[dict[str, float]] = field(default_factory=list)
    log_bytes: int = 0  # length of metrics.jsonl, so that a resumed run does not repeat lines


class _Loop:
    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        config: TrainConfig,
        folder: Path,
        evaluate: Callable[[nn.Module], dict[str, float]] | None,
        monitor: str,
        mode: Literal["min", "max"],
        device: str,
        log: Callable[..., None],
    ) -> None:
        self.config, self.batches, self.evaluate, self.log = config, batches, evaluate, log
        self.monitor, self.sign = monitor, 1.0 if mode == "min" else -1.0
        self.accelerator = accelerator(config, device)
        self.folder, self.checkpoint_folder = folder, folder / "checkpoints"
        self.plain: Any = model  # not wrapped; Any, as its optional methods are not nn.Module's
        optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.lr)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.progress = _Progress()
        self.means = RunningMeans(self.accelerator)
        self.started = time.perf_counter()

    @property
    def finished(self) -> bool:
        return self.progress.epoch >= self.config.epochs or self.stopped

    @property
    def stopped(self) -> bool:
        return 0 < self.config.patience <= self.progress.stale

    def resume(self) -> None:
        if self.accelerator.is_main_process:
            self.checkpoint_folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        found = checkpoints.latest(self.checkpoint_folder)
        if found is not None:
            self._refuse_other_run(found)
            checkpoints.restore(found, model=self.plain, optimizer=self.optimizer.optimizer)
            self.progress = _Progress(**found.state["progress"])
            self._load_scaler(found.state["scaler"])
            self.means.resume(self.progress.totals)
            self.log("resumed", step=found.step, epoch=self.progress.epoch)
        if self.accelerator.is_main_process:
            with (self.folder / "metrics.jsonl").open("ab") as lines:
                lines.truncate(self.progress.log_bytes)

    def run_epoch(self) -> None:
        at = self.progress
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        steps = len(self.batches)
        stream = self.batches.epoch(at.epoch, rank=rank, world=world)
        self.model.train()
        for batch in islice(stream, at.step_in_epoch, steps):
            try:
                self._train_step(batch)
            except torch.OutOfMemoryError as error:
                # A smaller batch would be another training (other negatives, other steps): that is not ours
                # to choose in the middle of the night.
                raise PrerankError(
                    f"out of GPU memory at step {at.step} with batches of {self.config.batch_size}",
                    f"set training.batch_size = {max(1, self.config.batch_size // 2)} in --config",
                ) from error
            at.step += 1
            at.step_in_epoch += 1
            every = self.config.checkpoint_every
            if every and at.step % every == 0 and at.step_in_epoch < steps:
                self._checkpoint()
        if at.step_in_epoch != steps:
            raise UsageError(
                f"epoch {at.epoch} gave {at.step_in_epoch} batches, its length says {steps}",
                "give every rank the same number of batches",
            )
        self._end_epoch()

    def _train_step(self, batch: Any) -> None:
        at = self.progress
        torch.manual_seed(step_seed(self.config.seed, at.step, self.accelerator.process_index))
        factor = lr_factor(at.step, self.config, len(self.batches) * self.config.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        outputs = dict(self.model(send_to_device(batch, self.accelerator.device)))
        weight = self.means.scalar(outputs.pop("weight", 1.0))
        self.accelerator.backward(outputs["loss"] * self._share(weight))
        if self.config.clip_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if hasattr(self.plain, "after_step"):
            with torch.no_grad():
                self.plain.after_step()
        self.means.add({**outputs, "lr": self.means.scalar(factor * self.config.lr)}, weight)

    def _share(self, weight: torch.Tensor) -> torch.Tensor | float:
        """This rank's share of the mean over all rows; DDP then averages the ranks."""
        world = self.accelerator.num_processes
        if world == 1:
            return 1.0
        return (weight * world / self.accelerator.reduce(weight, "sum").clamp(min=1e-12)).float()

    def _end_epoch(self) -> None:
        at = self.progress
        at.totals = self.means.fold()
        means = {k: v / at.totals["weight"] for k, v in at.totals.items() if k != "weight"}
        metrics = {"epoch": at.epoch, "step": at.step, **means, **self._evaluation()}
        value = self._agreed(metrics)
        if at.best_epoch < 0 or self.sign * value < self.sign * at.best:
            at.best, at.best_epoch, at.best_step, at.stale = value, at.epoch, at.step, 0
        else:
            at.stale += 1
        self._write(metrics)
        at.epoch, at.step_in_epoch, self.means.totals = at.epoch + 1, 0, {}
        self._checkpoint()

    def _evaluation(self) -> dict[str, float]:
        if self.evaluate is None or not self.accelerator.is_main_process:
            return {}
        self.plain.eval()
        with torch.no_grad():
            found = {name: float(value) for name, value in self.evaluate(self.plain).items()}
        self.plain.train()
        return found

    def _agreed(self, metrics: Mapping[str, float]) -> float:
        """Rank 0's monitored value, on every rank: all must stop at the same epoch."""
        if self.accelerator.is_main_process and self.monitor not in metrics:
            raise UsageError(f"no metric named {self.monitor!r}", f"one of: {', '.join(metrics)}")
        value = float(broadcast(self.means.scalar(metrics.get(self.monitor, 0.0))))
        if math.isnan(value):
            raise PrerankError(
                f"{self.monitor} is not a number after step {self.progress.step}",
                "lower lr, clip gradients (clip_norm), or train with precision = 'no'",
            )
        return value

    def _checkpoint(self) -> None:
        at = self.progress
        at.totals = self.means.fold()
        if self.accelerator.is_main_process:
            state = {"progress": vars(at), "scaler": self._scaler_state(), "run": self._identity()}
            checkpoints.save(
                self.checkpoint_folder,
                at.step,
                model=self.plain,
                optimizer=self.optimizer.optimizer,
                state=state,
            )
            checkpoints.prune(self.checkpoint_folder, protect=[at.best_step])
        self.accelerator.wait_for_everyone()

    def _write(self, metrics: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        self.progress.history.append(metrics)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            lines.write(json.dumps(finite) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
            self.progress.log_bytes = lines.tell()
        self.log("epoch", **metrics, seconds=round(time.perf_counter() - self.started, 1))

    def close(self) -> TrainResult:
        at = self.progress
        if self.config.patience and at.best_step != at.step:
            best = self.checkpoint_folder / f"step-{at.best_step:09d}"
            checkpoints.restore(checkpoints.Checkpoint(best, at.best_step, {}), model=self.plain)
        self.plain.eval()
        return TrainResult(at.step, at.epoch, at.best, at.best_epoch, self.stopped, at.history)

    def _identity(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(),
            "world": self.accelerator.num_processes,
            "steps": len(self.batches),
        }

    def _refuse_other_run(self, found: checkpoints.Checkpoint) -> None:
        before, now = found.state["run"], self._identity()
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            raise ConflictError(
                f"{found.path} was written with another {' and '.join(changed)}",
                "repeat the first command's settings, or delete the checkpoints (--overwrite) to start anew",
            )

    def _scaler_state(self) -> dict[str, float]:
        return dict(self.accelerator.scaler.state_dict()) if self.accelerator.scaler else {}

    def _load_scaler(self, state: Mapping[str, float]) -> None:
        if self.accelerator.scaler and state:
            self.accelerator.scaler.load_state_dict(dict(state))
