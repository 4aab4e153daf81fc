"""Towers: what a model must offer to be an encoder, and the precision it runs at."""

from __future__ import annotations

import torch
from torch import nn

GPU_FACTOR = 8  # a GPU takes batches this many times as large as a CPU's


class Tower(nn.Module):
    """A model that turns a batch of inputs into fp32 vectors (B, dim), not normalised."""

    dim: int


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
