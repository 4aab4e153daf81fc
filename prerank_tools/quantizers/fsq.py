"""Last-level FSQ (OneMall): residual k-means above, finite scalar digits of a learned projection below."""

# B rows of a batch, N items, D dims, G digits of the last level, K codes of the last level
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from prerank_tools.quantizers.assign import assign, decode
from prerank_tools.quantizers.codebook import Codebook
from prerank_tools.quantizers.rkmeans import RKMeans
from prerank_tools.quantizers.rqvae import fit_net
from prerank_tools.quantizers.rqvae_net import RQVAETraining, mlp, zero_last

BLOCK = 8_192  # rows encoded at once


class FSQTraining(RQVAETraining):
    """Short: the codes of the last level are given, only their bins move (ours)."""

    steps: int = Field(default=400, ge=1)
    lr: float = Field(default=1e-3, gt=0)


class FSQConfig(BaseModel):
    """`sizes` are the k-means levels, `digits` the values of each last-level scalar (12 x 2 is 4096)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sizes: tuple[int, ...] = (256, 256)
    digits: tuple[int, ...] = (2,) * 8
    hidden: int = Field(default=256, ge=1)
    train: FSQTraining = FSQTraining()


class FSQNet(nn.Module):
    """Residual -> G scalars in (-1, 1) -> digits -> residual; linear parts begin as the principal axes."""

    digits: torch.Tensor

    def __init__(self, width: int, digits: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        count = len(digits)
        self.register_buffer("digits", torch.tensor(digits))
        self.project, self.unproject = nn.Linear(width, count), nn.Linear(count, width)
        self.bend, self.unbend = mlp([width, hidden, count]), mlp([count, hidden, width])
        zero_last(self.bend)
        zero_last(self.unbend)

    def start_from(self, residual_ND: torch.Tensor) -> None:
        """Whitened principal axes: every digit starts with even use, where random axes would starve some."""
        mean_D = residual_ND.mean(dim=0)
        count = len(self.digits)
        covariance_DD = torch.cov(residual_ND.T.double()).reshape(len(mean_D), len(mean_D))
        value, axis = torch.linalg.eigh(covariance_DD)
        axis_GD = axis.flip(1)[:, :count].T
        spread_G = value.flip(0)[:count].clamp(min=1e-20).sqrt()
        with torch.no_grad():
            self.project.weight.copy_((axis_GD / spread_G[:, None]).float())
            self.project.bias.copy_(-self.project.weight @ mean_D)
            self.unproject.weight.copy_((axis_GD * spread_G[:, None]).T.float())
            self.unproject.bias.copy_(mean_D)

    def scalars(self, residual_BD: torch.Tensor) -> torch.Tensor:
        """Bounded scalars (B, G)."""
        return torch.tanh(self.project(residual_BD) + self.bend(residual_BD))

    def digits_of(self, scalar_BG: torch.Tensor) -> torch.Tensor:
        """Digits (B, G): equal bins of (-1, 1) (ours: the published rounding starves binary digits)."""
        bins_BG = torch.floor((scalar_BG + 1) / 2 * self.digits)
        return torch.minimum(bins_BG.clamp(min=0), self.digits - 1).long()

    def centres(self, digit_BG: torch.Tensor) -> torch.Tensor:
        """The middle of each digit's bin."""
        return (2 * digit_BG + 1).to(self.project.weight.dtype) / self.digits - 1

    def restore(self, centre_BG: torch.Tensor) -> torch.Tensor:
        """The residual that digits stand for (B, D)."""
        return self.unproject(centre_BG) + self.unbend(centre_BG)

    def forward(self, residual_BD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Summed squared error with straight-through digits."""
        scalar_BG = self.scalars(residual_BD)
        centre_BG = self.centres(self.digits_of(scalar_BG))
        restored_BD = self.restore(scalar_BG + (centre_BG - scalar_BG).detach())
        loss = (residual_BD - restored_BD).square().sum(dim=1).mean()
        return {"loss": loss, "weight": torch.tensor(float(len(residual_BD)))}


@dataclass
class RKMeansFSQ:
    """RQ-KMeans levels, then one FSQ level whose K codes decode through a table."""

    config: FSQConfig = field(default_factory=lambda: FSQConfig())
    means: tuple[np.ndarray, ...] = ()
    table_KD: np.ndarray | None = None
    net: FSQNet | None = None
    folder: Path | None = None  # keeps checkpoints, so that a killed fit goes on where it was
    log: Callable[..., None] = lambda *_, **__: None

    kind: ClassVar[str] = "rkmeans-fsq"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level, the FSQ level last."""
        return (*self.config.sizes, math.prod(self.config.digits))

    @property
    def width(self) -> int:
        """D, the width of the vectors it was fitted on."""
        return self._fitted().project.in_features

    def fit(self, x_ND: np.ndarray, *, seed: int = 0, threads: int = 2, device: str = "cpu") -> Self:
        """k-means on x (N, D), then the projection on what they leave."""
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        x_ND = np.ascontiguousarray(x_ND, dtype=np.float32)
        means = RKMeans(sizes=self.config.sizes).fit(x_ND, seed=seed, threads=threads, device=device)
        self.means = means.codebooks
        residual = torch.from_numpy(x_ND - means.decode(means.encode(x_ND, threads=threads, device=device)))
        self.net = FSQNet(x_ND.shape[1], self.config.digits, self.config.hidden)
        self.net.start_from(residual)
        fit_net(
            self.net,
            residual,
            config=self.config.train,
            seed=seed,
            device=device,
            folder=self.folder,
            log=self.log,
        )
        self.table_KD = self._table()
        return self

    def encode(self, x_ND: np.ndarray, *, threads: int = 2, device: str = "cpu") -> np.ndarray:
        """Codes (N, L) uint16; the last in mixed radix over the digits, the first digit most significant."""
        torch.set_num_threads(threads)
        codes_NL = np.empty((len(x_ND), len(self.sizes)), dtype=np.uint16)
        codes_NL[:, :-1] = assign(x_ND, self.means, threads=threads, device=device)
        net = self._fitted().double()
        try:
            with torch.no_grad():
                for at in range(0, len(x_ND), BLOCK):
                    above_ND = decode(codes_NL[at : at + BLOCK, :-1], self.means)
                    residual = torch.from_numpy(x_ND[at : at + BLOCK].astype(np.float64) - above_ND)
                    digit_BG = net.digits_of(net.scalars(residual)).numpy()
                    codes_NL[at : at + BLOCK, -1] = digit_BG @ self._radix()
        finally:
            net.float()
        return codes_NL

    def decode(self, codes_NL: np.ndarray) -> np.ndarray:
        """Vectors (N, D) float32 of codes."""
        return decode(codes_NL, self._levels())

    def to_codebook(self) -> Codebook:
        """The fitted quantizer as plain data; the last codebook is the table of all digit combinations."""
        weights = {name: value.numpy() for name, value in self._fitted().state_dict().items()}
        return Codebook(
            kind=self.kind,
            codebooks=self._levels(),
            width=self.width,
            meta={"digits": list(self.config.digits), "hidden": self.config.hidden},
            weights=weights,
            notes=self.config.model_dump(mode="json"),
        )

    @classmethod
    def from_codebook(cls, codebook: Codebook) -> Self:
        """The quantizer that a codebook describes."""
        meta: Any = codebook.meta
        config = FSQConfig(sizes=codebook.sizes[:-1], digits=tuple(meta["digits"]), hidden=meta["hidden"])
        net = FSQNet(codebook.width, config.digits, config.hidden)
        net.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in codebook.weights.items()})
        return cls(config, codebook.codebooks[:-1], codebook.codebooks[-1], net.eval())

    def _table(self) -> np.ndarray:
        net = self._fitted()
        code_K = np.arange(self.sizes[-1])
        digit_KG = code_K[:, None] // self._radix() % np.array(self.config.digits)
        with torch.no_grad():
            return np.ascontiguousarray(net.restore(net.centres(torch.from_numpy(digit_KG))).numpy())

    def _radix(self) -> np.ndarray:
        return np.cumprod([1, *self.config.digits[:0:-1]])[::-1].astype(np.int64)

    def _levels(self) -> tuple[np.ndarray, ...]:
        if self.table_KD is None:
            raise ValueError("rkmeans-fsq is not fitted: call fit or from_codebook first")
        return (*self.means, self.table_KD)

    def _fitted(self) -> FSQNet:
        if self.net is None:
            raise ValueError("rkmeans-fsq is not fitted: call fit or from_codebook first")
        return self.net
