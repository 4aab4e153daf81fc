"""How much of a tower learns: nothing, its last layers, low-rank adapters, or everything."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from prerank_tools.encoders.tower import Tower
from prerank_tools.errors import UsageError

Tune = Literal["head", "last", "lora", "full"]
STACK = 2  # a ModuleList of at least so many equal blocks is taken for a stack of layers


def tune(tower: Tower, how: Tune, *, layers: int = 2, rank: int = 8) -> Tower:
    """Set what of a tower learns: `head` nothing, `last` the final `layers` and what follows them.

    `lora` puts adapters of `rank` on every linear layer (peft); a network without any stays frozen.
    """
    if how == "full":
        tower.requires_grad_(True)
    elif how == "head":
        tower.requires_grad_(False)
    elif how == "last":
        _free_last(tower, layers)
    else:
        _adapt(tower, rank)
    return tower


def merge(tower: Tower) -> None:
    """Fold adapters into the weights, so that the saved model is a plain one."""
    model = getattr(tower, "model", None)
    if model is not None and hasattr(model, "merge_and_unload"):
        tower.model = model.merge_and_unload()


def _free_last(tower: Tower, layers: int) -> None:
    tower.requires_grad_(False)
    for stack in stacks(tower):
        for block in list(stack)[-layers:]:
            block.requires_grad_(True)
    for module in _after_the_stacks(tower):
        module.requires_grad_(True)


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """Outermost stacks of layers in the model: one for a text or vision model, two for a dual encoder."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) >= STACK
    ]
    if not found:
        raise UsageError("this model has no stack of layers", "train with tune = 'head', 'lora' or 'full'")
    outer = [m for n, m in found if not any(n.startswith(f"{other}.") for other, _ in found)]
    return outer


def _after_the_stacks(model: nn.Module) -> list[nn.Module]:
    """Leaf modules registered after the first stack: final norms, poolers, projections."""
    first = id(stacks(model)[0])
    modules = list(model.modules())
    start = next(i for i, module in enumerate(modules) if id(module) == first)
    inside = {id(module) for stack in stacks(model) for module in stack.modules()}
    return [m for m in modules[start:] if id(m) not in inside and not list(m.children()) and _late(m)]


def _late(module: nn.Module) -> bool:
    # A dual encoder's second half begins with embeddings again: they are no last layer.
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1)
    return not isinstance(module, nn.Embedding)


def _adapt(tower: Tower, rank: int) -> None:
    tower.requires_grad_(False)
    if not any(isinstance(module, nn.Linear) for module in tower.modules()):
        return
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError("tune = 'lora' needs peft", "pip install 'prerank[lora]'") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    model: Any = tower.model
    tower.model = get_peft_model(model, config)
