"""RQ-KMeans (QARM; OneRec, arXiv:2502.18965): k-means on the residuals, level by level; no encoder."""
# N items, D dims, L levels, K codes of a level

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.quantizers.assign import assign, assign_beam, assign_scaled, beam_residuals, decode
from prerank_tools.quantizers.codebook import Codebook

NOISE = 1.0  # of refining, at first: LSQ++'s
POINTS_PER_CODE = 256  # faiss takes a sample of this many; more do not move the centroids


@dataclass
class RKMeans:
    """Residual k-means with one codebook a level; `sizes` may differ between levels.

    `normalize="l2"` scales each vector to length 1 first. `residual_norm` scales the residuals between levels
    to length 1 (TorchEasyRec); decoding then uses their mean length. `beam` above 1 searches whole paths.
    `init="progressive"` starts k-means on few principal axes. `"random"` is for parity with a plain loop:
    every level starts from the same rows, so a deeper one may collapse.
    `refine` is the number of rounds in which all levels are then fitted together, under the beam; on CPU.
    """

    sizes: tuple[int, ...] = (256, 256, 256)
    iterations: int = 25
    init: Literal["random", "progressive"] = "progressive"
    normalize: Literal["none", "l2"] = "none"
    residual_norm: bool = False
    beam: int = 1
    refine: int = 0
    codebooks: tuple[np.ndarray, ...] = ()
    scale_L: np.ndarray = field(default_factory=lambda: np.zeros(0))
    stats: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "rkmeans"

    @property
    def width(self) -> int:
        """D, the width of the vectors it was fitted on."""
        return int(self.codebooks[0].shape[1])

    def fit(self, x_ND: np.ndarray, *, seed: int = 0, threads: int = 2, device: str = "cpu") -> Self:
        """Fit all levels on x (N, D): faiss on CPU, torch on GPU.

        On CPU, with `init="random"`, the centroids are those of a plain loop over
        `faiss.Kmeans(D, K, niter=iterations, seed=seed)`, its search, and subtraction. With a beam, a level
        is fitted on what all paths kept so far leave, as faiss' ResidualQuantizer does, unless `refine`
        follows: a greedy start is as good and cheaper. Raises ContractError where a level has more codes
        than there are rows.
        """
        r_ND = self.prepared(x_ND)
        check_rows(len(r_ND), self.sizes)
        codebooks, lengths = [], np.ones(len(r_ND))
        self.scale_L = np.ones(len(self.sizes))
        for level in range(len(self.sizes)):
            codebook_KD, code_N = self._fit_level(r_ND, level, seed=seed, threads=threads, device=device)
            codebooks.append(codebook_KD)
            if self.beam > 1 and not self.refine and level + 1 < len(self.sizes):
                rows = POINTS_PER_CODE * max(self.sizes)
                r_ND = beam_residuals(self.prepared(x_ND), codebooks, beam=self.beam, rows=rows, seed=seed)
                continue
            r_ND = r_ND - codebook_KD[code_N]
            if self.residual_norm and level + 1 < len(self.sizes):
                norm_N = np.maximum(np.linalg.norm(r_ND, axis=1), 1e-12)
                r_ND /= norm_N[:, None]
                lengths *= norm_N
                self.scale_L[level + 1] = lengths.mean()
        self.codebooks = self._refined(x_ND, codebooks, seed, threads) if self.refine else tuple(codebooks)
        self.notes = {"seed": seed, "rows": len(x_ND), "iterations": self.iterations, "init": self.init}
        self.notes |= {"refine": self.refine} if self.refine else {}
        return self

    def encode(self, x_ND: np.ndarray, *, threads: int = 2, device: str = "cpu") -> np.ndarray:
        """Codes (N, L) uint16; exact, so equal on every device, batch size and thread count."""
        x_ND = self.prepared(x_ND)
        if self.residual_norm:
            return assign_scaled(x_ND, self.codebooks)
        if self.beam > 1:
            return assign_beam(x_ND, self.codebooks, beam=self.beam)
        return assign(x_ND, self.codebooks, threads=threads, device=device)

    def decode(self, codes_NL: np.ndarray) -> np.ndarray:
        """The vectors (N, D) float32 that the codes stand for; normalised ones where `normalize` is set."""
        scaled = [
            codebook_KD * scale for codebook_KD, scale in zip(self.codebooks, self.scale_L, strict=True)
        ]
        return decode(codes_NL, scaled)

    def to_codebook(self) -> Codebook:
        """As plain data, to be saved."""
        meta = {"normalize": self.normalize, "residual_norm": self.residual_norm, "beam": self.beam}
        weights = {"scale": self.scale_L} if self.residual_norm else {}
        return Codebook(
            kind=self.kind,
            codebooks=self.codebooks,
            width=self.width,
            meta=meta,
            weights=weights,
            notes=self.notes,
            stats=self.stats,
        )

    @classmethod
    def from_codebook(cls, codebook: Codebook) -> Self:
        """Back from plain data."""
        return cls(
            sizes=codebook.sizes,
            codebooks=codebook.codebooks,
            scale_L=codebook.weights.get("scale", np.ones(len(codebook.sizes))),
            stats=dict(codebook.stats),
            notes=dict(codebook.notes),
            **codebook.meta,
        )

    def prepared(self, x_ND: np.ndarray) -> np.ndarray:
        """The vectors as the levels see them: scaled to length 1 where `normalize` says so."""
        if self.normalize == "none":
            return x_ND if x_ND.dtype in (np.float32, np.float16, np.int8) else x_ND.astype(np.float32)
        wide_ND = x_ND.astype(np.float64)
        return (wide_ND / np.sqrt((wide_ND**2).sum(axis=1, keepdims=True))).astype(np.float32)

    def _refined(
        self, x_ND: np.ndarray, codebooks: Sequence[np.ndarray], seed: int, threads: int
    ) -> tuple[np.ndarray, ...]:
        import torch

        from prerank_tools.quantizers.refine import refine

        if self.residual_norm:
            raise UsageError(
                "refine needs codes that add up; residual_norm scales them", "drop one of the two"
            )
        rows = POINTS_PER_CODE * max(self.sizes)
        take_N = np.sort(np.random.default_rng(seed).permutation(len(x_ND))[:rows])
        torch.set_num_threads(threads)
        sample_ND = self.prepared(x_ND[take_N])
        return refine(sample_ND, codebooks, beam=self.beam, rounds=self.refine, noise=NOISE, seed=seed)

    def _fit_level(
        self, r_ND: np.ndarray, level: int, *, seed: int, threads: int, device: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """(codebook, code of every row) of one level."""
        size = self.sizes[level]
        if device != "cpu":
            from prerank_tools.quantizers.kmeans_torch import kmeans_torch

            return kmeans_torch(
                r_ND, size, iterations=self.iterations, seed=seed, device=device, init=self.init
            )
        if self.init == "progressive":
            from prerank_tools.quantizers.kmeans_progressive import kmeans_progressive

            return kmeans_progressive(r_ND, size, iterations=self.iterations, seed=seed, threads=threads)
        return kmeans_faiss(r_ND, size, iterations=self.iterations, seed=seed, threads=threads)


def kmeans_faiss(
    x_ND: np.ndarray, size: int, *, iterations: int, seed: int, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """(centroids_KD, nearest centroid of every row) of faiss' k-means and its search."""
    import faiss

    x_ND = np.ascontiguousarray(x_ND, dtype=np.float32)
    options = {"min_points_per_centroid": 1, "max_points_per_centroid": POINTS_PER_CODE}
    with faiss_threads(threads):
        kmeans = faiss.Kmeans(x_ND.shape[1], size, niter=iterations, seed=seed, **options)
        kmeans.train(x_ND)
        _, code_N1 = kmeans.index.search(x_ND, 1)
    return np.array(kmeans.centroids), code_N1[:, 0]


def check_rows(rows: int, sizes: tuple[int, ...]) -> None:
    """Refuse a level with more codes than vectors: k-means has no such answer."""
    if rows < 2:
        raise ContractError(f"{rows} vector to fit: a codebook needs two or more", "give more items")
    if max(sizes) > rows:
        raise ContractError(
            f"{max(sizes)} codes a level, but only {rows} vectors to fit",
            f"leave `codes` unset, or set it to {fitting_size(rows)} or less",
        )


def fitting_size(rows: int, largest: int = 256) -> int:
    """A power of two with at least four vectors a code: what a small catalogue can fill (ours)."""
    return max(2, min(largest, 1 << max(0, (rows // 4).bit_length() - 1)))


@contextmanager
def faiss_threads(threads: int) -> Iterator[None]:
    """faiss on so many threads, then as it was."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
