"""SimTier as torch layers: what a scorer takes from the cosines of the long and the recent behaviours."""
# B candidates, K behaviours, N tiers

from __future__ import annotations

import torch
from torch import Tensor, nn

from prerank_tools.gsu.simtier import TIERS


class SimTier(nn.Module):
    """`log(1 + count) * weight`, with a learnable weight a tier that starts in U(0, 1) (MUSE's code)."""

    def __init__(self, tiers: int = TIERS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(tiers))

    def forward(self, counts_BN: Tensor) -> Tensor:
        """Stored raw counts (uint8 or any number), shape (B, N), to features (B, N)."""
        return torch.log1p(counts_BN.to(self.weight.dtype)) * self.weight


def tier_counts(sims_BK: Tensor, valid_BK: Tensor | None = None) -> Tensor:
    """Raw counts (B, 22) of cosines (B, K), as `simtier.simtier`; invalid and padded ones are not counted."""
    tier_BK = torch.ceil(sims_BK.float() * 10.0).long() + 10
    real_BK = (tier_BK >= 0) & (tier_BK < TIERS)
    if valid_BK is not None:
        real_BK &= valid_BK
    counts_BN = sims_BK.new_zeros(len(sims_BK), TIERS, dtype=torch.float32)
    return counts_BN.scatter_add_(1, tier_BK.clamp(0, TIERS - 1), real_BK.float())


def recent_tier_counts(candidate_BD: Tensor, behaviors_BSD: Tensor, valid_BS: Tensor) -> Tensor:
    """Raw counts (B, 22) of the cosines with the S most recent behaviours (S is 50 in MUSE).

    Vectors need not be unit length; zero vectors and exact-zero cosines are not counted. No gradient.
    """
    with torch.no_grad():
        unit_BD = nn.functional.normalize(candidate_BD.float(), dim=-1)
        unit_BSD = nn.functional.normalize(behaviors_BSD.float(), dim=-1)
        sims_BS = torch.einsum("bd,bsd->bs", unit_BD, unit_BSD)
        return tier_counts(sims_BS, valid_BS & (sims_BS != 0))
