"""Attention over short texts: what SDPA gives in float64, and text vectors as on a CPU. Needs a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from prerank_tools.encoders.loading import EmbedConfig, load_text
from prerank_tools.encoders.text import TextEncoder
from tests.encoders import tiny_models

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("length", [1, 3, 12, 32, 33, 40, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_each_text_is_that_of_sdpa(length: int, masked: bool) -> None:
    from prerank_tools.encoders.short_attention_triton import attend, attend_opaque

    make = torch.Generator("cuda").manual_seed(length)
    q, k, v = (
        torch.randn(19, length, 3, 32, device="cuda", generator=make).bfloat16().transpose(1, 2)
        for _ in range(3)
    )
    seen_B = torch.randint(1, length + 1, (19, 1), device="cuda", generator=make)
    mask = torch.arange(length, device="cuda") < seen_B if masked else None
    wide = None if mask is None else mask[:, None, None]
    true = sdpa(q.double(), k.double(), v.double(), attn_mask=wide).transpose(1, 2)
    for run in (attend, attend_opaque):
        found = run(q, k, v, mask, 32**-0.5).double()
        assert found.shape == true.shape and (found - true).norm() / true.norm() < 5e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_vectors_are_those_of_a_cpu(tmp_path: Path, compiled: bool) -> None:
    folder = tiny_models.bert(tmp_path)
    titles = ["red dress", "blue shirt for men", "shoe", "a b c a b c a b c summer", "women"] * 3
    titles = [f"{title} {'red ' * n}" for n, title in enumerate(titles)]
    expected = load_text(folder, EmbedConfig(precision="fp32"), device="cpu").encode(titles)
    encoder = load_text(folder, EmbedConfig(precision="bf16", compile=compiled), device="cuda")
    assert isinstance(encoder, TextEncoder) and encoder.shape == "sorted"
    assert ((encoder.encode(titles) * expected).sum(1)).min() > 0.999
    exact = load_text(folder, EmbedConfig(precision="fp32", exact_batches=True), device="cuda")
    assert isinstance(exact, TextEncoder) and exact.shape == "exact"
    np.testing.assert_allclose(exact.encode(titles), expected, atol=1e-5)
