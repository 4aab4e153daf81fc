"""Contrastive losses: InfoNCE with masked negatives, and a triplet term on hard ones."""

# B queries, N keys, D dims

from __future__ import annotations

import torch
from torch import Tensor, nn


def info_nce(logits_BN: Tensor, positive_B: Tensor, *, masked_BN: Tensor | None = None) -> Tensor:
    """Mean of -log softmax(logits)[positive]; `masked` keys are no negatives (a positive is never masked).

    `logits` are cosines over the temperature, `positive_B` the column of each query's key. A scalar.
    """
    if masked_BN is not None:
        keep = torch.zeros_like(masked_BN).scatter_(1, positive_B[:, None], True)
        logits_BN = logits_BN.masked_fill(masked_BN & ~keep, -torch.inf)
    return nn.functional.cross_entropy(logits_BN, positive_B)


def triplet(
    positive_B: Tensor, negative_B: Tensor, *, margin: float, valid_B: Tensor | None = None
) -> Tensor:
    """Mean of max(0, margin + d(q, k+) - d(q, k_hard)), d = cosine distance; both come as cosines (MUSE 1.1).

    Rows without a hard negative (`valid_B` false) count as zero, so that a batch with few of them is not
    ruled by those few (ours).
    """
    loss_B = (margin - positive_B + negative_B).clamp(min=0)
    return (loss_B if valid_B is None else torch.where(valid_B, loss_B, 0.0)).mean()
