"""What towers are built from: an MLP, input scaling that travels with the weights, code embeddings."""

# n rows, F features, C coded features, B blocks of features
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CLIP = 8.0  # scaled inputs beyond eight deviations say "very many", not how many


def mlp(width: int, hidden: Sequence[int], out: int, *, norm: bool = False) -> nn.Sequential:
    """Linear layers `width -> hidden... -> out`, ReLU between; LayerNorm before each ReLU if `norm`."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers.append(nn.Linear(width, size))
        if norm:
            layers.append(nn.LayerNorm(size))
        layers.append(nn.ReLU())
        width = size
    return nn.Sequential(*layers, nn.Linear(width, out))


class InputScale(nn.Module):
    """(x - shift) * scale, clipped; the statistics are buffers, so a model never meets another's."""

    shift_F: Tensor
    scale_F: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("shift_F", torch.zeros(width))
        self.register_buffer("scale_F", torch.ones(width))

    def forward(self, x_nF: Tensor) -> Tensor:
        return ((x_nF - self.shift_F) * self.scale_F).clamp(-CLIP, CLIP)

    @torch.no_grad()
    def fit_columns(self, x_nF: Tensor) -> None:
        """Every column to mean 0 and deviation 1; a constant column to 0."""
        mean_F, std_F = x_nF.double().mean(0), x_nF.double().std(0, unbiased=False)
        self.shift_F.copy_(mean_F)
        self.scale_F.copy_(torch.where(std_F > 1e-6, 1 / std_F.clamp_min(1e-6), torch.zeros_like(std_F)))

    @torch.no_grad()
    def fit_blocks(self, x_nF: Tensor, widths: Sequence[int]) -> None:
        """Every block (an embedding, say) to a root mean square of 1; zero rows, the missing, stay zero."""
        start = 0
        for width in widths:
            block = x_nF[:, start : start + width].double()
            present = block[block.abs().sum(1) > 0]
            rms = float(present.square().mean().sqrt()) if present.numel() else 0.0
            self.scale_F[start : start + width] = 1 / rms if rms > 1e-6 else 0.0
            start += width


class CodeEmbeddings(nn.Module):
    """Coded features (SID levels, categories) to their embeddings; codes outside the book are unknown."""

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size + 1, width) for size in sizes)
        self.sizes, self.width = tuple(sizes), width * len(sizes)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.05)  # type: ignore[arg-type]

    def forward(self, codes_nC: Tensor) -> Tensor:
        if not len(self.tables):
            return codes_nC.new_zeros((len(codes_nC), 0), dtype=torch.float32)
        rows = [
            table(torch.where(codes_nC[:, c] < size, codes_nC[:, c] + 1, 0).clamp_min(0))
            for c, (size, table) in enumerate(zip(self.sizes, self.tables, strict=True))
        ]
        return torch.cat(rows, dim=1)
