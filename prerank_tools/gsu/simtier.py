"""SimTier: the cosines of a candidate's top-K behaviours as a histogram of tiers (MUSE, arXiv:2512.07216)."""
# M candidates, K behaviours, N tiers

from __future__ import annotations

import numpy as np

TIERS = 22
PAD_SIM = np.float32(-1.1)  # MUSE's value for "no behaviour here": it falls below tier 0 and is never counted


def simtier(sims_MK: np.ndarray) -> np.ndarray:
    """Count the cosines of each row in MUSE's 22 tiers; uint8 (M, 22), raw counts (`np.log1p` for a model).

    A row sums to its number of real behaviours: `PAD_SIM` and anything outside the tiers are not counted.
    """
    return _counts(tier_of(sims_MK), TIERS)


def tier_of(sims: np.ndarray) -> np.ndarray:
    """Tier of each cosine, `ceil(10 r) + 10` in float32 as MUSE: 1..20 are 0.1 wide, 0 is -1, 21 is > 1."""
    tenths = np.float32(1) / np.float32(0.1)
    return np.ceil(np.asarray(sims, dtype=np.float32) * tenths).astype(np.int64) + 10


def uniform_simtier(sims_MK: np.ndarray, tiers: int) -> np.ndarray:
    """The paper's text, not its code: `tiers` equal tiers over [-1, 1]; uint8 (M, tiers), raw counts."""
    return _counts(uniform_tier_of(sims_MK, tiers), tiers)


def uniform_tier_of(sims: np.ndarray, tiers: int) -> np.ndarray:
    """Tier of each cosine among `tiers` equal ones over [-1, 1], `floor((r + 1) / 2 N)`; padding is -1."""
    sims = np.asarray(sims, dtype=np.float64)
    tier = np.clip(np.floor((sims + 1) / 2 * tiers).astype(np.int64), 0, tiers - 1)
    return np.where(sims < -1, -1, tier)


def _counts(tier_MK: np.ndarray, tiers: int) -> np.ndarray:
    rows, _ = tier_MK.shape
    real = (tier_MK >= 0) & (tier_MK < tiers)
    cell = tier_MK + np.arange(rows)[:, None] * tiers
    return np.bincount(cell[real], minlength=rows * tiers).reshape(rows, tiers).astype(np.uint8)
