"""What a step needs beside the model: accelerate's settings, parameter groups, learning rate, seed."""

from __future__ import annotations

import math
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState

from prerank_tools.errors import UsageError
from prerank_tools.training.config import TrainConfig


def accelerator(config: TrainConfig, device: str) -> Accelerator:
    """Mixed precision and device; gradients of all ranks are averaged."""
    on_cpu = device == "cpu"
    if on_cpu and config.precision == "fp16":
        raise UsageError("precision 'fp16' needs a GPU", "use precision = 'bf16' or 'no' on a CPU")
    # accelerate keeps its settings for the life of the process; a second training may want others.
    AcceleratorState._reset_state(reset_partial_state=True)
    # Not every parameter takes part in every batch (the placeholder of a modality nobody lacks), and buffers
    # such as queues are kept equal by the model itself.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    return Accelerator(cpu=on_cpu, mixed_precision=config.precision, kwargs_handlers=[ddp])


def parameter_groups(model: Any, config: TrainConfig) -> list[dict[str, Any]]:
    """The model's own groups, else decayed matrices and undecayed vectors."""
    if hasattr(model, "parameter_groups"):
        return list(model.parameter_groups(config.lr, config.weight_decay))
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, plain = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    return [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if group
    ]


def lr_factor(step: int, config: TrainConfig, total: int) -> float:
    """What the learning rate is multiplied with at a step of `total`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if config.schedule == "linear" else 1.0


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step's randomness."""
    # A linear map modulo a prime keeps (step, rank) pairs apart and is the same on every platform.
    return (seed * 1_000_003 + step * 8_191 + rank) % (2**61 - 1)
