"""Patch embeddings as a product: what the convolution gives, for patch convolutions alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prerank_tools.encoders.patches import PatchProduct, multiply_patches


@pytest.mark.parametrize(("kernel", "size", "bias"), [((4, 4), (12, 8), True), ((2, 3), (7, 10), False)])
def test_a_product_over_patches_is_the_convolution(
    kernel: tuple[int, int], size: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, kernel, kernel, bias=bias).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(PatchProduct(conv)(x.to(memory_format=layout)), conv(x))


def test_other_convolutions_stay() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 2, 2),
        nn.Sequential(nn.Conv2d(4, 4, 3, 1)),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 2, 2, 1),
    )
    multiply_patches(model)
    kinds = [type(module) for module in model.modules() if not isinstance(module, nn.Sequential)]
    assert kinds == [PatchProduct, nn.Conv2d, nn.Conv2d, nn.Conv2d]
