"""Neighbours of whole items: a space of frozen features whose neighbourhoods a fused vector is to keep."""

# N items, B items of one batch, T text dims, I image dims, E dims of the space, M items of all ranks

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from prerank_tools.training.gather import first_row, gather_rows, row_counts

MOST_ANCHORS = 8192  # items whose neighbours are looked for among all: the cost stays linear in the items
BLOCK = 1024
FLOOR = 0.3  # of the mean scatter, added to every direction before whitening
RIDGE = 1.0


class NeighbourConfig(BaseModel):
    """How a whole item (text and image) is held to its frozen neighbourhood; all of it is ours."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Times the term in the loss. None: 1 where no pair shows an item whole (picture <-> title), else 0.
    weight: float | None = Field(default=None, ge=0)
    temperature: float = Field(default=0.05, gt=0)  # of the frozen space; the encoder's is learnt
    text: float = Field(default=0.4, ge=0)  # weight of the text's own directions beside the picture's
    dims: int = Field(default=128, ge=2)  # principal components of each modality
    nearest: int = Field(default=5, ge=1)  # neighbours of an item that tell which directions do not matter
    # Share of the words left out in half of the views of a whole item, so that where it lies hangs on no
    # single word; queries keep theirs.
    word_dropout: float = Field(default=0.3, ge=0, lt=1)


def neighbour_space(text_NT: Tensor, image_NI: Tensor, config: NeighbourConfig) -> Tensor:
    """Unit z_NE in which near items are alike in picture and text; nothing but the features is used (ours).

    Three steps: the picture is added to what the text lets one expect of it (ridge regression: a text that
    says little about the picture is predicted near the mean and so weighs little, whatever it says); the
    text's own directions join at weight `text`; and directions in which the nearest neighbours differ are
    shrunk (whitening by their scatter, as relevant component analysis does with known pairs).
    """
    text_NE, image_NE = (principal(x, config.dims) for x in (text_NT, image_NI))
    expected_NE = ridge(centred(text_NT), image_NE)
    z_NE = normalize(torch.cat([image_NE + expected_NE, config.text * text_NE], dim=1), dim=1)
    return whitened(z_NE, config.nearest)


def centred(x_ND: Tensor) -> Tensor:
    """Unit rows about their mean."""
    x_ND = normalize(x_ND.double(), dim=1)
    return normalize(x_ND - x_ND.mean(0), dim=1)


def principal(x_ND: Tensor, dims: int) -> Tensor:
    """Unit rows of the first `dims` principal components (or as many as there are)."""
    x_ND = centred(x_ND)
    x_ND = x_ND - x_ND.mean(0)
    _, axes_DD = torch.linalg.eigh(x_ND.T @ x_ND)  # ascending
    return normalize(x_ND @ axes_DD.flip(1)[:, :dims], dim=1)


def ridge(x_ND: Tensor, y_NE: Tensor) -> Tensor:
    """Least squares of y on x with a penalty, at x."""
    gram_DD = x_ND.T @ x_ND + RIDGE * torch.eye(x_ND.shape[1], dtype=x_ND.dtype)
    return x_ND @ torch.linalg.solve(gram_DD, x_ND.T @ y_NE)


def whitened(z_NE: Tensor, nearest: int) -> Tensor:
    """z with the scatter between near neighbours made round, in fp32 unit rows."""
    anchors, neighbours = nearest_pairs(z_NE.float(), nearest)
    gap_PE = z_NE[anchors] - z_NE[neighbours]
    values_E, axes_EE = torch.linalg.eigh(gap_PE.T @ gap_PE / max(len(gap_PE), 1))
    scale_E = (values_E + FLOOR * values_E.mean()).clamp(min=1e-12).rsqrt()
    return normalize((z_NE @ axes_EE) * scale_E, dim=1).float()


def nearest_pairs(z_NE: Tensor, nearest: int) -> tuple[Tensor, Tensor]:
    """(anchor, neighbour) rows: the `nearest` others of up to MOST_ANCHORS items spread over the table."""
    anchors = torch.arange(0, len(z_NE), -(-len(z_NE) // MOST_ANCHORS))
    nearest = min(nearest, len(z_NE) - 1)
    found = []
    for rows in anchors.split(BLOCK):
        cosine_BN = z_NE[rows] @ z_NE.T
        cosine_BN[torch.arange(len(rows)), rows] = -torch.inf
        found.append(cosine_BN.topk(nearest, dim=1).indices)
    return anchors.repeat_interleave(nearest), torch.cat(found).flatten()


class NeighbourTerm(nn.Module):
    """`weight` times the cross entropy of an item's softmax over the others: frozen space against encoder."""

    def __init__(self, weight: float = 1.0, temperature: float = 0.05) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, x_BD: Tensor, z_BE: Tensor) -> Tensor:
        """A scalar: x are fused vectors, z their frozen ones; a zero z neither asks nor answers."""
        x_MD, z_ME = gather_rows(x_BD), gather_rows(z_BE)
        rows_B = torch.arange(len(x_BD), device=x_BD.device)
        hidden_BM = ~z_ME.any(1).expand(len(x_BD), -1) | ~z_BE.any(1)[:, None]
        hidden_BM[rows_B, rows_B + first_row(row_counts(x_BD))] = True
        with torch.autocast(x_BD.device.type, enabled=False):
            scale = self.log_scale.clamp(0.0, math.log(100.0)).exp()
            wanted_BM = masked_log_softmax(z_BE @ z_ME.T / self.temperature, hidden_BM).exp()
            log_BM = masked_log_softmax(x_BD.float() @ x_MD.float().T * scale, hidden_BM)
        # Also 0 for a row that has no other: everything in it is hidden.
        return -self.weight * (wanted_BM * log_BM).masked_fill(hidden_BM, 0.0).sum(1).mean()


def masked_log_softmax(logits_BM: Tensor, hidden_BM: Tensor) -> Tensor:
    """log softmax over what is not hidden; finite also in a row that hides everything."""
    return logits_BM.masked_fill(hidden_BM, -1e4).log_softmax(1)
