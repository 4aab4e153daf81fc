"""The network of RQ-VAE: encoder, residual codebooks that stay in use, decoder, and its losses."""

# B rows of a batch, D dims of the input, E dims of a code, K codes of a level
from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from prerank_tools.quantizers.sinkhorn import sinkhorn_forge
from prerank_tools.training.loop import TrainConfig


class RQVAETraining(TrainConfig):
    """How long and how fast (ours: LC-Rec takes 10,000 epochs).

    Where `epochs` is not set, training takes `steps` whatever the size of the catalogue, and an epoch, the
    time between checkpoints, at least 50 of them.
    """

    steps: int = Field(default=1_000, ge=1)
    batch_size: int = Field(default=1_024, ge=1)
    lr: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"


class RQVAEConfig(BaseModel):
    """Knobs of RQ-VAE; losses, init and EMA as in the literature's remedies for collapse, the rest ours.

    One hidden layer and 128 dims: TIGER's 512-256-128 -> 32 wants its 20,000 epochs, and in a training of
    this length left half as much error again (benchmarks/results/quantizers.md).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sizes: tuple[int, ...] = (256, 256, 256)
    code_dim: int = Field(default=128, ge=1)
    hidden: tuple[int, ...] = (512,)
    commitment: float = Field(default=0.25, ge=0)
    init: Literal["kmeans", "progressive", "random"] = "kmeans"  # progressive: k-means on ever more axes
    codebook: Literal["ema", "loss"] = "ema"
    ema_decay: float = Field(default=0.99, gt=0, lt=1)
    # EMA count, as a share of its mean, under which a code is restarted; 0: never. FORGE's fixed 1 would
    # restart everything where a batch holds fewer rows than the level has codes.
    dead_below: float = Field(default=0.1, ge=0, lt=1)
    estimator: Literal["straight-through", "rotation"] = "straight-through"
    sinkhorn: bool = True  # balanced codes in training, argmin at export (FORGE)
    train: RQVAETraining = RQVAETraining()


class ResidualCodebooks(nn.Module):
    """L codebooks, each of its own size.

    The residual is taken with sg(q), so the commitment of every level, not only of the first, reaches the
    encoder.
    """

    def __init__(self, config: RQVAEConfig, code_dim: int) -> None:
        super().__init__()
        self.config = config
        self.codes = nn.ParameterList(
            nn.Parameter(torch.randn(size, code_dim) * 0.1, requires_grad=config.codebook == "loss")
            for size in config.sizes
        )
        for level, size in enumerate(config.sizes):
            self.register_buffer(f"count_{level}", torch.ones(size))
            self.register_buffer(f"sum_{level}", self.codes[level].detach().clone())
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def load(self, codebooks: Sequence[np.ndarray]) -> None:
        """Set the codebooks, and the running averages to match."""
        with torch.no_grad():
            for level, codebook_KE in enumerate(codebooks):
                self.codes[level].copy_(torch.from_numpy(codebook_KE))
                self.get_buffer(f"sum_{level}").copy_(self.codes[level])
                self.get_buffer(f"count_{level}").fill_(1.0)

    def forward(self, e_BE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the chosen codes (B, E), without a gradient estimator, and the quantisation loss."""
        e_BE = e_BE.float()  # codes are chosen and averaged in float32, whatever the encoder runs in
        residual_BE, loss = e_BE, e_BE.new_zeros(())
        self.pending = []
        for codes_KE in self.codes:
            code_B = self._choose(residual_BE.detach(), codes_KE.detach())
            q_BE = codes_KE[code_B]
            loss = loss + self.config.commitment * _sum_square(residual_BE - q_BE.detach())
            if self.config.codebook == "loss":
                loss = loss + _sum_square(residual_BE.detach() - q_BE)
            if self.training:
                self.pending.append((residual_BE.detach(), code_B))
            residual_BE = residual_BE - q_BE.detach()
        return e_BE - residual_BE, loss

    def after_step(self) -> None:
        """EMA of counts and sums (decay .99, Laplace eps 1e-5), then restart codes that nobody uses."""
        for level, (residual_BE, code_B) in enumerate(self.pending):
            codes_KE = self.codes[level]
            count_K, sum_KE = self.get_buffer(f"count_{level}"), self.get_buffer(f"sum_{level}")
            one_BK = nn.functional.one_hot(code_B, len(codes_KE)).to(residual_BE.dtype)
            batch_count_K, batch_sum_KE = _over_ranks(one_BK.sum(0)), _over_ranks(one_BK.T @ residual_BE)
            count_K.lerp_(batch_count_K, 1 - self.config.ema_decay)
            sum_KE.lerp_(batch_sum_KE, 1 - self.config.ema_decay)
            if self.config.codebook == "ema":
                smooth_K = (count_K + 1e-5) / (count_K.sum() + len(count_K) * 1e-5) * count_K.sum()
                codes_KE.copy_(sum_KE / smooth_K[:, None])
            self._restart(codes_KE, count_K, sum_KE, residual_BE)
        self.pending = []

    def _choose(self, residual_BE: torch.Tensor, codes_KE: torch.Tensor) -> torch.Tensor:
        d_BK = torch.cdist(residual_BE.float(), codes_KE.float()).square()
        if self.training and self.config.sinkhorn:
            return sinkhorn_forge(d_BK).argmax(dim=1)
        return d_BK.argmin(dim=1)

    def _restart(
        self, codes_KE: torch.Tensor, count_K: torch.Tensor, sum_KE: torch.Tensor, residual_BE: torch.Tensor
    ) -> None:
        mean = count_K.mean()
        dead_K = count_K < self.config.dead_below * mean
        if not dead_K.any():
            return
        pick = torch.randint(len(residual_BE), (int(dead_K.sum()),), device=residual_BE.device)
        fresh = _from_first_rank(residual_BE[pick].to(codes_KE.dtype))
        codes_KE[dead_K], sum_KE[dead_K], count_K[dead_K] = fresh, fresh * mean, mean


class RQVAENet(nn.Module):
    """Encoder, codebooks and decoder.

    All losses are sums over dims and means over rows: a mean reconstruction beside summed quantisation losses
    collapses the codes.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, config: RQVAEConfig, width: int, *, skip: bool = False) -> None:
        super().__init__()
        self.config, self.skip = config, skip
        code_dim = width if skip else config.code_dim
        self.encoder = mlp([width, *config.hidden, code_dim])
        self.decoder = mlp([code_dim, *reversed(config.hidden), width])
        if skip:
            zero_last(self.encoder)
            zero_last(self.decoder)
        self.codebooks = ResidualCodebooks(config, code_dim)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(1))

    def encode(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Latents (B, E) of raw vectors."""
        x_BD = (x_BD - self.mean) / self.scale
        e_BE: torch.Tensor = self.encoder(x_BD)
        return x_BD + e_BE if self.skip else e_BE

    def decode(self, z_BE: torch.Tensor) -> torch.Tensor:
        """Raw vectors (B, D) of quantised latents."""
        x_BD: torch.Tensor = self.decoder(z_BE)
        return (z_BE + x_BD if self.skip else x_BD) * self.scale + self.mean

    def forward(self, x_BD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses of a batch."""
        e_BE = self.encode(x_BD)
        q_BE, quantisation = self.codebooks(e_BE)
        z_BE = rotate(e_BE, q_BE) if self.config.estimator == "rotation" else e_BE + (q_BE - e_BE).detach()
        reconstruction = _sum_square((x_BD - self.decode(z_BE)) / self.scale)
        return {
            "loss": reconstruction + quantisation,
            "reconstruction": reconstruction,
            "quantisation": quantisation,
            "weight": torch.tensor(float(len(x_BD))),
        }

    def after_step(self) -> None:
        """Called by the training loop after each optimiser step."""
        self.codebooks.after_step()


def rotate(e_BE: torch.Tensor, q_BE: torch.Tensor) -> torch.Tensor:
    """q in value; in gradient e rotated and scaled onto q (the rotation trick, arXiv:2410.06424).

    The angle between e and the gradient then survives quantisation. Once, on the sum of all levels (ours).
    """
    e, q = e_BE.detach(), q_BE.detach()
    length_e, length_q = (v.norm(dim=1, keepdim=True).clamp(min=1e-8) for v in (e, q))
    e_hat, q_hat = e / length_e, q / length_q
    half = nn.functional.normalize(e_hat + q_hat, dim=1)
    reflected = e_BE - 2 * (e_BE * half).sum(1, keepdim=True) * half
    return (reflected + 2 * (e_BE * e_hat).sum(1, keepdim=True) * q_hat) * (length_q / length_e)


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def zero_last(layers: nn.Sequential) -> None:
    """Make a network return zero until it is trained."""
    last: Any = layers[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def _sum_square(x_BD: torch.Tensor) -> torch.Tensor:
    return x_BD.square().sum(dim=1).mean()


def _over_ranks(value: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value


def _from_first_rank(value: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(value, src=0)
    return value
