"""All ranks' rows in one tensor, in rank order and ragged; gradients find their way back."""

# B rows of this rank, N rows of all ranks

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(x_B: Tensor) -> Tensor:
    """Concatenate `x_B` (B rows, any trailing shape) over the ranks; without torch.distributed, `x_B` itself.

    The gradient of a rank's rows is the sum over all ranks' losses, as if one process held the whole batch.
    """
    if not distributed():
        return x_B
    return _GatherRows.apply(x_B, row_counts(x_B))


def row_counts(x_B: Tensor) -> list[int]:
    """How many rows each rank holds; collective."""
    if not distributed():
        return [len(x_B)]
    counts = [torch.zeros(1, dtype=torch.int64, device=x_B.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(x_B)], device=x_B.device))
    return [int(count) for count in counts]


def first_row(counts: list[int]) -> int:
    """Where this rank's rows start among the gathered ones."""
    return sum(counts[: dist.get_rank()]) if distributed() else 0


def distributed() -> bool:
    """Whether there is more than this process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_B: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        # Collectives want equal shapes, the last batch of an epoch is ragged: pad, then cut.
        padded = x_B.new_zeros(max(counts), *x_B.shape[1:])
        padded[: len(x_B)] = x_B
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_N = grads[0].contiguous()
        dist.all_reduce(grad_N)
        start = first_row(ctx.counts)
        return grad_N[start : start + ctx.counts[dist.get_rank()]], None
