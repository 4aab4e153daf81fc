"""Patch embeddings as one matrix product: a GPU's convolutions are slow at three channels."""

# B images, C channels, H height, W width, P side of a patch, D dims

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear


class PatchProduct(nn.Module):
    """What a convolution does whose stride is its kernel: (B, C, H, W) -> (B, D, H / P, W / P)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.patch = conv.kernel_size
        self.weight = nn.Parameter(conv.weight.detach().flatten(1).contiguous(), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x_BCHW: Tensor) -> Tensor:
        high, wide = self.patch
        rows, columns = x_BCHW.shape[2] // high, x_BCHW.shape[3] // wide
        x_BCHW = x_BCHW[:, :, : rows * high, : columns * wide]
        patches = x_BCHW.unflatten(3, (columns, wide)).unflatten(2, (rows, high))
        flat = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return linear(flat, self.weight, self.bias).transpose(1, 2).unflatten(2, (rows, columns))


def multiply_patches(model: nn.Module) -> None:
    """Put a `PatchProduct` in the place of every convolution that cuts its input into patches."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if cuts_patches(child):
                setattr(module, name, PatchProduct(child))  # type: ignore[arg-type]


def cuts_patches(module: nn.Module) -> bool:
    """Does a convolution see each pixel once?"""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride
        and max(module.kernel_size) > 1
        and module.padding in ((0, 0), "valid")
        and module.dilation == (1, 1)
        and module.groups == 1
    )
