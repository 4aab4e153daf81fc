"""Towers: what a model must offer to be an encoder, the precision it runs at, batches that fit the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prerank_tools.errors import PrerankError

GPU_FACTOR = 8  # a GPU takes batches this many times as large as a CPU's


class Tower(nn.Module):
    """A model that turns a batch of inputs into fp32 vectors (B, dim), not normalised."""

    dim: int


def no_log(event: str, **fields: Any) -> None:
    """Says nothing."""


def compile_blocks(tower: Tower, *, dynamic: bool) -> None:
    """torch.compile for each of a model's equal blocks: one compilation serves all of them.

    Compiled as a whole, transformers' attention loses its fast kernels (a mask is built where there is none),
    and it takes minutes. A model without equal blocks is compiled whole.
    """
    stacks = [stack for stack in tower.modules() if isinstance(stack, nn.ModuleList) and equal_blocks(stack)]
    for block in [block for stack in stacks for block in stack] or [tower]:
        block.compile(dynamic=dynamic)


def equal_blocks(stack: nn.ModuleList) -> bool:
    """Two blocks or more of one class with weights of the same shapes."""
    kinds = {(type(block), tuple(weight.shape for weight in block.parameters())) for block in stack}
    return len(stack) > 1 and len(kinds) == 1


class InPieces:
    """Runs batches in as many pieces as the device's memory turns out to need.

    A batch for which memory runs out is cut into halves, and so are all later ones. Raises PrerankError where
    not even one row fits.
    """

    def __init__(self, forward: Callable[..., Tensor], log: Callable[..., None] = no_log) -> None:
        self.forward = forward
        self.log = log
        self.pieces = 1

    def __call__(self, x_B: Tensor, *more_B: Tensor | None) -> Tensor:
        """What `forward` makes of a batch; its arguments share their first axis or are None."""
        while True:
            rows = -(-len(x_B) // self.pieces)
            try:
                return self._run(rows, x_B, *more_B)
            except torch.OutOfMemoryError as fault:
                if rows == 1:
                    raise PrerankError(
                        f"out of memory on {x_B.device}: not even one row of {tuple(x_B.shape[1:])} fits",
                        "shorten text.max_tokens in --config, or use --device cpu",
                    ) from fault
            # Only here is the failed pass's memory free: the exception held its frames.
            self.pieces *= 2
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            self.log("out_of_memory", rows=rows, next=-(-rows // 2))

    def _run(self, rows: int, x_B: Tensor, *more_B: Tensor | None) -> Tensor:
        if rows >= len(x_B):
            return self.forward(x_B, *more_B)
        cuts = [slice(start, start + rows) for start in range(0, len(x_B), rows)]
        parts = [self.forward(x_B[cut], *(None if y is None else y[cut] for y in more_B)) for cut in cuts]
        return torch.cat(parts)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """bf16 where asked for, or by `auto` where the device multiplies it natively; fp32 otherwise."""
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Are there bf16 matrix instructions (AMX, AVX512-BF16)? Emulated, bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
