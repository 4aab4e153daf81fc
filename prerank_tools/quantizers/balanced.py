"""Balanced RQ-KMeans: every code of a level (the last, or all) takes about the same number of items.

OneRec v1 and MiniOneRec bound the cluster sizes while fitting, and lose the balance when items then go to
their nearest centroid. Ours prices the codes: code = argmin |r - c|^2 + price. Prices that balance the
fit set exist (power diagrams; Aurenhammer 1998) and hold for new items too. A price is the square of one more
coordinate, which is zero in every item: assignment and all its guarantees stay those of RQ-KMeans.
"""
# N items, D dims, L levels, K codes of a level

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import numpy as np

from prerank_tools.quantizers.codebook import Codebook
from prerank_tools.quantizers.rkmeans import RKMeans

CELLS = 1 << 26  # distances held while pricing: rows are left out beyond it
ROUNDS = (6, 40)  # at least and at most: centroids follow their items, prices follow the counts
EVEN = 1.1  # of its share in the fullest code: balanced
STEPS = 60  # price steps a round


@dataclass
class BalancedRKMeans(RKMeans):
    """RQ-KMeans with priced codes; `last` as OneSearch has it, since balance above breaks the hierarchy."""

    balance: Literal["last", "all"] = "last"
    dims: int = 0

    kind: ClassVar[str] = "balanced-rkmeans"

    @property
    def width(self) -> int:
        """D, the width of the vectors it was fitted on."""
        return self.dims

    def fit(self, x_ND: np.ndarray, *, seed: int = 0, threads: int = 2, device: str = "cpu") -> Self:
        """RQ-KMeans level by level, then centroids and prices of the balanced levels in turn."""
        self.dims = x_ND.shape[1]
        return super().fit(x_ND, seed=seed, threads=threads, device=device)

    def prepared(self, x_ND: np.ndarray) -> np.ndarray:
        """The vectors with a zero coordinate a level, where the prices are."""
        return np.pad(super().prepared(x_ND), ((0, 0), (0, len(self.sizes))))

    def decode(self, codes_NL: np.ndarray) -> np.ndarray:
        """The vectors (N, D) float32 that the codes stand for."""
        return super().decode(codes_NL)[:, : self.dims]

    def to_codebook(self) -> Codebook:
        """As plain data, to be saved."""
        plain = super().to_codebook()
        return replace(plain, meta={**plain.meta, "balance": self.balance, "dims": self.dims})

    def _fit_level(
        self, r_ND: np.ndarray, level: int, *, seed: int, threads: int, device: str
    ) -> tuple[np.ndarray, np.ndarray]:
        # What earlier prices left in their coordinates is the same for all codes: it must not reach k-means.
        plain_ND = np.ascontiguousarray(r_ND[:, : self.dims])
        codebook_KD, _ = super()._fit_level(plain_ND, level, seed=seed, threads=threads, device=device)
        price_K = np.zeros(len(codebook_KD))
        if self.balance == "all" or level + 1 == len(self.sizes):
            codebook_KD, price_K = _balanced(plain_ND, codebook_KD)
        priced_KD = np.zeros((len(codebook_KD), r_ND.shape[1]), dtype=np.float32)
        priced_KD[:, : self.dims] = codebook_KD
        priced_KD[:, self.dims + level] = np.sqrt(price_K - price_K.min())
        return priced_KD, self._codes(plain_ND, priced_KD, threads)

    def _codes(self, plain_ND: np.ndarray, priced_KD: np.ndarray, threads: int) -> np.ndarray:
        from prerank_tools.quantizers.assign import assign

        padded_ND = np.pad(plain_ND, ((0, 0), (0, len(self.sizes))))
        return assign(padded_ND, [priced_KD], threads=threads)[:, 0]


def _balanced(r_ND: np.ndarray, codebook_KD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(centroids, prices) under which the fit set spreads evenly."""
    size = len(codebook_KD)
    step = -(-len(r_ND) * size // CELLS)
    r_ND = r_ND[::step]
    price_K = np.zeros(size)
    least, most = ROUNDS
    for done in range(1, most + 1):
        norm_K = np.einsum("kd,kd->k", codebook_KD, codebook_KD)
        distance_NK = norm_K - 2.0 * (r_ND @ codebook_KD.T)
        price_K = _prices(distance_NK, price_K)
        code_N = (distance_NK + price_K.astype(np.float32)).argmin(axis=1)
        count_K = np.bincount(code_N, minlength=size)
        # Left as priced: centroids that move once more would leave their prices behind.
        if done == most or (done > least and count_K.max() * size <= EVEN * len(r_ND)):
            break
        sum_KD = np.zeros(codebook_KD.shape)
        np.add.at(sum_KD, code_N, r_ND)
        used_K = count_K > 0
        codebook_KD = codebook_KD.copy()
        codebook_KD[used_K] = sum_KD[used_K] / count_K[used_K, None]
    return codebook_KD, price_K


def _prices(distance_NK: np.ndarray, price_K: np.ndarray) -> np.ndarray:
    """Raise the price of full codes, lower that of empty ones; a step grows until its code overshoots."""
    target = len(distance_NK) / distance_NK.shape[1]
    step_K = np.full(len(price_K), 0.1 * float(distance_NK.std()))
    before_K = np.zeros(len(price_K))
    best_K, least = price_K, np.inf
    for _ in range(STEPS):
        code_N = (distance_NK + price_K.astype(np.float32)).argmin(axis=1)
        excess_K = np.bincount(code_N, minlength=len(price_K)) / target - 1.0
        if (excess_K**2).sum() < least:
            best_K, least = price_K, float((excess_K**2).sum())
        # Rprop (Riedmiller and Braun 1993): counts say which way, not how far.
        turn_K = np.sign(excess_K) * np.sign(before_K)
        step_K *= np.where(turn_K > 0, 1.2, np.where(turn_K < 0, 0.5, 1.0))
        price_K = price_K + np.sign(excess_K) * step_K
        before_K = excess_K
    return best_K
