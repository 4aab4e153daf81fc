"""Attention over short texts on a GPU: several texts share one block of rows.

The general kernels give each text of ten tokens a tile of 64 or 128 rows of its own; here a block of rows
holds as many whole texts as fit, and products between two texts are masked out. Ours.
"""

# B texts, S padded length, H heads, D dims of a head; R rows of a block

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

NAME = "prerank_short"
LONGEST = 64  # longer texts fill the tiles of the general kernels
LOG2_E = 1.44269504


def use_short_attention(model: Any) -> bool:
    """Let a transformers model take it; False where the model asks no interface for its attention."""
    if not (hasattr(model, "_can_set_attn_implementation") and model._can_set_attn_implementation()):
        return False
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_of)
    model.set_attn_implementation(NAME)
    return model.config._attn_implementation == NAME


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' SDPA; short two-way texts take the kernel below."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    plain = not causal and kwargs.get("position_bias") is None and not kwargs.get("dropout")
    if plain and takes(query, key, value) and (attention_mask is None or attention_mask.dim() == 2):
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        # Traced, the kernel would lose what is known of its strides, and with it three quarters of its speed.
        run = attend_opaque if torch.compiler.is_compiling() else attend
        return run(query, key, value, attention_mask, scale), None
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None, :]
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
    )


def takes(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> bool:
    """Is this a shape and a type the kernel reads?"""
    return (
        q_BHSD.is_cuda
        and q_BHSD.dtype in (torch.bfloat16, torch.float16)
        and q_BHSD.shape == k_BHSD.shape == v_BHSD.shape
        and q_BHSD.shape[2] <= LONGEST
        and q_BHSD.shape[3] in (16, 32, 64, 128)
    )


def mask_of(**given: Any) -> Tensor | None:
    """The 2-D mask itself for two-way attention, else SDPA's."""
    mask = given["attention_mask"]
    if given["mask_function"] is bidirectional_mask_function and (mask is None or mask.dim() == 2):
        return mask
    return sdpa_mask(**given)


def attend(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask_BS: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T * scale) v of each text -> (B, S, H, D); keys where `mask_BS` is False are not seen."""
    texts, heads, length, width = q_BHSD.shape
    q, k, v = (by_token(x) for x in (q_BHSD, k_BHSD, v_BHSD))
    out_BSHD = torch.empty((texts, length, heads, width), dtype=q.dtype, device=q.device)
    rows = 64 if length <= 32 else 128
    whole = rows // length * length
    blocks = triton.cdiv(texts * length, whole)
    mask = q if mask_BS is None else mask_BS.contiguous()
    _attend[(blocks, heads)](
        q, k, v, mask, out_BSHD, texts * length, length, whole, scale * LOG2_E,
        q.stride(2), k.stride(2), v.stride(2), q.stride(1), k.stride(1), v.stride(1), heads * width,
        D=width, R=rows, MASKED=mask_BS is not None, num_warps=4,
    )  # fmt: skip
    return out_BSHD


@library.custom_op("prerank::short_attention", mutates_args=())
def attend_opaque(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask_BS: Tensor | None, scale: float
) -> Tensor:
    """`attend` as one operation that a compiler does not look into."""
    return attend(q_BHSD, k_BHSD, v_BHSD, mask_BS, scale)


@attend_opaque.register_fake
def _(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask_BS: Tensor | None, scale: float) -> Tensor:
    return torch.empty_like(q_BHSD.transpose(1, 2), memory_format=torch.contiguous_format)


def by_token(x_BHSD: Tensor) -> Tensor:
    """The same values where token n of all texts lies n strides from the first."""
    length = x_BHSD.shape[2]
    if x_BHSD.stride(3) == 1 and x_BHSD.stride(0) == length * x_BHSD.stride(2):
        return x_BHSD
    return x_BHSD.transpose(1, 2).contiguous().transpose(1, 2)


@triton.jit
def _attend(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: int,
    length: int,
    whole: int,
    scale: float,
    q_token: int,
    k_token: int,
    v_token: int,
    q_head: int,
    k_head: int,
    v_head: int,
    out_token: int,
    D: tl.constexpr,
    R: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    head = tl.program_id(1)
    r = tl.arange(0, R)
    d = tl.arange(0, D)
    token = (tl.program_id(0) * whole + r).to(tl.int64)
    inside = (r < whole) & (token < tokens)
    q = tl.load(q_ptr + token[:, None] * q_token + head * q_head + d[None, :], inside[:, None], 0.0)
    k = tl.load(k_ptr + token[:, None] * k_token + head * k_head + d[None, :], inside[:, None], 0.0)
    score = tl.dot(q, tl.trans(k)) * scale
    text = r // length
    seen = text[:, None] == text[None, :]
    if MASKED:
        # a row past the end sees itself, so that no row divides by nothing
        visible = tl.load(mask_ptr + token, inside, 1) != 0
        seen = seen & visible[None, :]
    score = tl.where(seen, score, float("-inf"))
    weight = tl.exp2(score - tl.max(score, 1)[:, None])
    total = tl.sum(weight, 1)
    v = tl.load(v_ptr + token[:, None] * v_token + head * v_head + d[None, :], inside[:, None], 0.0)
    y = tl.dot(weight.to(v.dtype), v) / total[:, None]
    at = out_ptr + token[:, None] * out_token + head * D + d[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), inside[:, None])
