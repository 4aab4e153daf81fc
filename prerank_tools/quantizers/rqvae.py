"""RQ-VAE (TIGER, LC-Rec): codes of a learned narrow space, trained so that no level collapses."""

# N items, D dims of the input, E dims of a code, L levels
from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import nn

from prerank_tools.quantizers.assign import assign, decode
from prerank_tools.quantizers.codebook import Codebook
from prerank_tools.quantizers.rkmeans import POINTS_PER_CODE, RKMeans
from prerank_tools.quantizers.rqvae_net import RQVAEConfig, RQVAENet, RQVAETraining
from prerank_tools.training.batches import ShuffledRows
from prerank_tools.training.loop import train

BLOCK = 8_192  # rows encoded at once
EPOCH_STEPS = 50  # a checkpoint after every few batches would cost more than the batches


@dataclass
class RQVAE:
    """The quantizer: `fit`, then `encode` to codes and `decode` to vectors; always argmin, never Sinkhorn."""

    config: RQVAEConfig = field(default_factory=lambda: RQVAEConfig())
    net: RQVAENet | None = None
    folder: Path | None = None  # keeps checkpoints, so that a killed fit goes on where it was
    log: Callable[..., None] = lambda *_, **__: None

    kind: ClassVar[str] = "rqvae"
    skip: ClassVar[bool] = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level."""
        return self.config.sizes

    @property
    def width(self) -> int:
        """D, the width of the vectors it was fitted on."""
        return len(self._net().mean)

    def fit(self, x_ND: np.ndarray, *, seed: int = 0, threads: int = 2, device: str = "cpu") -> Self:
        """Train on x (N, D), from the net it already has where there is one."""
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        x = torch.from_numpy(np.ascontiguousarray(x_ND, dtype=np.float32))
        if self.net is None:
            self.net = RQVAENet(self.config, x.shape[1], skip=self.skip)
            self.net.mean.copy_(x.mean(dim=0))
            self.net.scale.copy_((x - self.net.mean).square().mean().sqrt().clamp(min=1e-12))
            self._init_codebooks(x, seed, threads)
        fit_net(
            self.net, x, config=self.config.train, seed=seed, device=device, folder=self.folder, log=self.log
        )
        return self

    def encode(self, x_ND: np.ndarray, *, threads: int = 2, device: str = "cpu") -> np.ndarray:
        """Codes (N, L) uint16: the nearest code of each level to the latent's residual."""
        latent_NE = self.project(x_ND, threads=threads, device=device)
        return assign(latent_NE, self._codebooks(), threads=threads, device=device)

    def project(self, x_ND: np.ndarray, *, threads: int = 2, device: str = "cpu") -> np.ndarray:
        """Latents (N, E) float32, the space of the codebooks.

        Computed in float64: a float32 product depends on batch size and device by enough to flip codes.
        """
        torch.set_num_threads(threads)
        return self._map("encode", x_ND, device)

    def decode(self, codes_NL: np.ndarray) -> np.ndarray:
        """Vectors (N, D) float32 of codes."""
        return self._map("decode", decode(codes_NL, self._codebooks()), "cpu")

    def to_codebook(self) -> Codebook:
        """The fitted quantizer as plain data."""
        net = self._net()
        weights = {
            name: value.detach().cpu().numpy()
            for name, value in net.state_dict().items()
            if not name.startswith("codebooks.")
        }
        return Codebook(
            kind=self.kind,
            codebooks=tuple(self._codebooks()),
            width=self.width,
            meta={"code_dim": self.config.code_dim, "hidden": list(self.config.hidden)},
            weights=weights,
            notes=self.config.model_dump(mode="json"),
        )

    @classmethod
    def from_codebook(cls, codebook: Codebook) -> Self:
        """The quantizer that a codebook describes."""
        config = _config_of(codebook)
        net = RQVAENet(config, codebook.width, skip=cls.skip)
        net.load_state_dict(
            {k: torch.from_numpy(v.copy()) for k, v in codebook.weights.items()}, strict=False
        )
        net.codebooks.load(codebook.codebooks)
        return cls(config, net.eval())

    def _init_codebooks(self, x: torch.Tensor, seed: int, threads: int) -> None:
        if self.config.init == "random":
            return
        sample_N = np.random.default_rng(seed).permutation(len(x))[: POINTS_PER_CODE * max(self.sizes)]
        latent_NE = self._map("encode", x.numpy()[np.sort(sample_N)], "cpu")
        start: Literal["random", "progressive"] = "random" if self.config.init == "kmeans" else "progressive"
        means = RKMeans(sizes=self.sizes, init=start).fit(latent_NE, seed=seed, threads=threads)
        self._net().codebooks.load(means.to_codebook().codebooks)

    def _map(self, method: str, rows: np.ndarray, device: str) -> np.ndarray:
        net = self._net().double().to(device)
        try:
            with torch.no_grad():
                # Copies: the rows may be mapped from a file, which torch would warn of.
                parts = (rows[at : at + BLOCK].astype(np.float64) for at in range(0, len(rows), BLOCK))
                blocks = [getattr(net, method)(torch.from_numpy(p).to(device)).float().cpu() for p in parts]
        finally:
            net.float().cpu()
        return torch.cat(blocks).numpy() if blocks else np.zeros((0, self.config.code_dim), dtype=np.float32)

    def _codebooks(self) -> list[np.ndarray]:
        return [codes_KE.detach().cpu().numpy() for codes_KE in self._net().codebooks.codes]

    def _net(self) -> RQVAENet:
        if self.net is None:
            raise ValueError(f"{self.kind} is not fitted: call fit or from_codebook first")
        return self.net


def fit_net(
    net: nn.Module,
    x: torch.Tensor,
    *,
    config: RQVAETraining,
    seed: int,
    device: str,
    folder: Path | None,
    log: Callable[..., None],
) -> None:
    """Train a net on rows of x; without a folder the checkpoints are temporary."""
    if folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            fit_net(net, x, config=config, seed=seed, device=device, folder=Path(scratch), log=log)
        return
    passes, epochs = _length(-(-len(x) // config.batch_size), config)
    batches = ShuffledRows(
        passes * len(x), lambda rows: x[torch.from_numpy(rows % len(x))], config.batch_size, seed
    )
    settings = config.model_copy(update={"seed": seed, "epochs": epochs})
    train(net, batches, config=settings, folder=folder, device=device, log=log)
    net.cpu().eval()


def _length(batches: int, config: RQVAETraining) -> tuple[int, int]:
    """(passes over the rows in an epoch, epochs)."""
    if "epochs" in config.model_fields_set:
        return 1, config.epochs
    passes = -(-EPOCH_STEPS // batches)
    return passes, -(-config.steps // (passes * batches))


def _config_of(codebook: Codebook) -> RQVAEConfig:
    return RQVAEConfig(
        sizes=codebook.sizes, code_dim=codebook.meta["code_dim"], hidden=tuple(codebook.meta["hidden"])
    )
