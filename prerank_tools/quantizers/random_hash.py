"""The control: codes of a hash of the vector's bytes, of the same shape as an SID and without any meaning."""
# N items, D dims, L levels, K codes of a level

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from prerank_tools.quantizers.codebook import Codebook
from prerank_tools.quantizers.duplicates import row_hashes


@dataclass
class RandomHash:
    """If a model does as well on these, the semantic part of its SIDs is not doing the work."""

    sizes: tuple[int, ...] = (256, 256, 256)
    mean_D: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "random-hash"

    @property
    def width(self) -> int:
        """D, the width of the vectors it was fitted on."""
        return len(self.mean_D)

    def fit(self, x_ND: np.ndarray, *, seed: int = 0, threads: int = 2, device: str = "cpu") -> Self:
        """Keep the mean, the best guess that codes without meaning allow."""
        self.mean_D = x_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
        self.seed, self.notes = seed, {"seed": seed, "rows": len(x_ND)}
        return self

    def encode(self, x_ND: np.ndarray, *, threads: int = 2, device: str = "cpu") -> np.ndarray:
        """Codes (N, L) uint16, even over each level; equal vectors get equal codes."""
        word_N = row_hashes(x_ND.astype(np.float32, copy=False)) + np.uint64(self.seed)
        codes_NL = np.empty((len(x_ND), len(self.sizes)), dtype=np.uint16)
        for level, size in enumerate(self.sizes):
            word_N = _mixed(word_N + np.uint64(0x9E3779B97F4A7C15))
            codes_NL[:, level] = (word_N >> np.uint64(32)) % np.uint64(size)
        return codes_NL

    def decode(self, codes_NL: np.ndarray) -> np.ndarray:
        """The mean vector (N, D), whatever the codes."""
        return np.broadcast_to(self.mean_D, (len(codes_NL), self.width)).copy()

    def to_codebook(self) -> Codebook:
        """As plain data: the mean under every code of the first level, zeros below."""
        first_KD = np.repeat(self.mean_D[None], self.sizes[0], axis=0)
        rest = [np.zeros((size, self.width), dtype=np.float32) for size in self.sizes[1:]]
        meta = {"seed": self.seed}
        return Codebook(self.kind, (first_KD, *rest), self.width, meta=meta, notes=self.notes)

    @classmethod
    def from_codebook(cls, codebook: Codebook) -> Self:
        """Back from plain data."""
        mean_D = codebook.codebooks[0][0]
        return cls(codebook.sizes, mean_D, int(codebook.meta["seed"]), dict(codebook.notes))


def _mixed(word_N: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    word_N = (word_N ^ (word_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word_N = (word_N ^ (word_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(word_N ^ (word_N >> np.uint64(31)))
