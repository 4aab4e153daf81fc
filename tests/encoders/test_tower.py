"""What of a model is compiled: its equal blocks, or the whole where there are none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prerank_tools.encoders.efficientnet import Block, EfficientNetLite, EfficientNetLiteConfig
from prerank_tools.encoders.tower import Tower, compile_blocks


class Stack(Tower):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for width in widths])
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


def compiled(tower: nn.Module) -> list[str]:
    return [name for name, module in tower.named_modules() if module._compiled_call_impl is not None]


def test_equal_blocks_are_compiled_one_by_one() -> None:
    tower = Stack(4, 4, 4)
    compile_blocks(tower, dynamic=True)
    assert compiled(tower) == ["layers.0", "layers.1", "layers.2"]


def test_a_model_of_unequal_blocks_is_compiled_whole() -> None:
    shape = {"kernel": 3, "stride": 1, "expand": 2}
    blocks = (
        Block(channels_in=8, channels_out=8, **shape),
        Block(channels_in=8, channels_out=16, **shape),
    )
    lite = EfficientNetLite(EfficientNetLiteConfig(stem=8, hidden_size=16, blocks=blocks))
    for tower in (lite, Stack(4), Stack(4, 5)):
        compile_blocks(tower, dynamic=False)
        assert compiled(tower) == [""]


def test_compiling_is_put_off_until_the_first_call() -> None:
    tower = Stack(4, 4)
    compile_blocks(tower, dynamic=True)
    torch.testing.assert_close(tower(torch.ones(2, 4)), tower.last(torch.ones(2, 4)))
