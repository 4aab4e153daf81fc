"""RQ-KMeans+ (GPR): an RQ-VAE that begins as RQ-KMeans and may only get better from there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import Field

from prerank_tools.quantizers.rqvae import RQVAE
from prerank_tools.quantizers.rqvae_net import RQVAEConfig, RQVAETraining


class RKMeansPlusTraining(RQVAETraining):
    """Smaller steps, as the start is good already; GPR's 1e-4 is for more of them (ours)."""

    lr: float = Field(default=3e-4, gt=0)


class RKMeansPlusConfig(RQVAEConfig):
    """As RQ-VAE, without a narrow code: the encoder is x + MLP(x), its last layer zero at first."""

    hidden: tuple[int, ...] = (256,)
    init: Literal["kmeans", "progressive", "random"] = "progressive"
    sinkhorn: bool = False  # the k-means codes are in use from the start
    train: RKMeansPlusTraining = RKMeansPlusTraining()


@dataclass
class RKMeansPlus(RQVAE):
    """Encoder x + MLP(x) (MiniOneRec's form of GPR) and a decoder z + MLP(z) (ours)."""

    config: RQVAEConfig = field(default_factory=lambda: RKMeansPlusConfig())

    kind: ClassVar[str] = "rkmeans-plus"
    skip: ClassVar[bool] = True
