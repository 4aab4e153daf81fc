"""EfficientNet-Lite: a vision network for CPUs (no squeeze-and-excite, ReLU6), batch norms folded away."""

# B images, C channels, H height, W width

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from prerank_tools.encoders.tower import Tower

BN_EPS = 1e-3  # as in the TensorFlow original


class Block(BaseModel):
    """One inverted residual block: depthwise `kernel`, `stride`, widening factor, channels in and out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel: int
    stride: int
    expand: int
    channels_in: int
    channels_out: int


class EfficientNetLiteConfig(BaseModel):
    """Shape of the network and the `config.json` of its model folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prerank_model: str = "efficientnet_lite"
    stem: int = 32
    hidden_size: int = 1280
    blocks: tuple[Block, ...]


def lite0() -> EfficientNetLiteConfig:
    """EfficientNet-Lite0: 4.6 M parameters, 224 x 224 pixels, 1280 dimensions."""
    stages = (  # kernel, stride, expand, channels out, blocks: table 1 of arXiv:1905.11946
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 2),
        (5, 2, 6, 40, 2),
        (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3),
        (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    )
    blocks, channels = [], 32
    for kernel, stride, expand, out, repeats in stages:
        for repeat in range(repeats):
            block = Block(
                kernel=kernel,
                stride=stride if repeat == 0 else 1,
                expand=expand,
                channels_in=channels,
                channels_out=out,
            )
            blocks.append(block)
            channels = out
    return EfficientNetLiteConfig(blocks=tuple(blocks))


class EfficientNetLite(Tower):
    """Pixels (B, 3, H, W) -> the pooled map (B, 1280) in fp32; a tower as `ImageTower` is."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.hidden_size
        self.stem = SameConv(3, config.stem, kernel=3, stride=2)
        self.blocks = nn.ModuleList([InvertedResidual(block) for block in config.blocks])
        self.head = SameConv(config.blocks[-1].channels_out, config.hidden_size, kernel=1)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BCHW = relu6(self.stem(pixels_BCHW))
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        return relu6(self.head(x_BCHW)).float().mean(dim=(2, 3))


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow; the input added where shapes allow it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        wide = block.channels_in * block.expand
        self.expand = SameConv(block.channels_in, wide, kernel=1) if block.expand > 1 else None
        self.depthwise = SameConv(wide, wide, kernel=block.kernel, stride=block.stride, groups=wide)
        self.project = SameConv(wide, block.channels_out, kernel=1)
        self.residual = block.stride == 1 and block.channels_in == block.channels_out

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = relu6(self.expand(x_BCHW)) if self.expand is not None else x_BCHW
        y_BCHW = self.project(relu6(self.depthwise(y_BCHW)))
        return x_BCHW + y_BCHW if self.residual else y_BCHW


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does: the odd pixel goes to the right and the bottom."""

    def __init__(
        self, channels_in: int, channels_out: int, *, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel == 1:
            return super().forward(x_BCHW)
        pads: list[int] = []
        for size in (x_BCHW.shape[3], x_BCHW.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(pad(x_BCHW, pads))


def fold_published_weights(
    published: Mapping[str, Tensor], config: EfficientNetLiteConfig
) -> dict[str, Tensor]:
    """The PyTorch port's state dict, each batch norm folded into its convolution, the classifier dropped.

    A frozen batch norm is a scale and a shift per channel, so nothing is lost, also for fine-tuning.
    """
    state: dict[str, Tensor] = {}

    def fold(to: str, conv: str, norm: str) -> None:
        scale_C = published[f"{norm}.weight"] / torch.sqrt(published[f"{norm}.running_var"] + BN_EPS)
        state[f"{to}.weight"] = published[f"{conv}.weight"] * scale_C[:, None, None, None]
        state[f"{to}.bias"] = published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * scale_C

    fold("stem", "_conv_stem", "_bn0")
    fold("head", "_conv_head", "_bn1")
    for number, block in enumerate(config.blocks):
        source = f"_blocks.{number}"
        if block.expand > 1:
            fold(f"blocks.{number}.expand", f"{source}._expand_conv", f"{source}._bn0")
        fold(f"blocks.{number}.depthwise", f"{source}._depthwise_conv", f"{source}._bn1")
        fold(f"blocks.{number}.project", f"{source}._project_conv", f"{source}._bn2")
    return state
