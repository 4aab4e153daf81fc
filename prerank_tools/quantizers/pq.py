"""Product quantization after a learned rotation (OPQ; Ge et al., CVPR 2013): a level is a slice."""
# N items, D dims, L levels (slices), W dims of a slice, K codes of a level

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from prerank_tools.quantizers.assign import assign
from prerank_tools.quantizers.codebook import Codebook
from prerank_tools.quantizers.rkmeans import check_rows, kmeans_faiss

BLOCK = 4_096  # rows rotated at once, always: a product's last bits depend on its shape


@dataclass
class ProductQuantizer:
    """OPQ where `rotate`, else plain PQ. Levels are equals: without a hierarchy a prefix means little."""

    sizes: tuple[int, ...] = (256, 256, 256)
    iterations: int = 25
    rotate: bool = True
    rotation_DD: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    codebooks: tuple[np.ndarray, ...] = ()
    dims: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "pq"

    @property
    def width(self) -> int:
        """D, the width of the vectors it was fitted on."""
        return self.dims

    def fit(self, x_ND: np.ndarray, *, seed: int = 0, threads: int = 2, device: str = "cpu") -> Self:
        """faiss' OPQ rotation, then k-means in every slice; zeros fill dims up to a multiple of L."""
        check_rows(len(x_ND), self.sizes)
        self.dims = x_ND.shape[1]
        padded_ND = self._padded(x_ND)
        self.rotation_DD = (
            self._rotation(padded_ND, threads)
            if self.rotate
            else np.eye(padded_ND.shape[1], dtype=np.float32)
        )
        slices = np.split(self._rotated(x_ND), len(self.sizes), axis=1)
        fitted = [
            kmeans_faiss(slice_NW, size, iterations=self.iterations, seed=seed, threads=threads)[0]
            for slice_NW, size in zip(slices, self.sizes, strict=True)
        ]
        self.codebooks = tuple(fitted)
        self.notes = {"seed": seed, "rows": len(x_ND), "iterations": self.iterations}
        return self

    def encode(self, x_ND: np.ndarray, *, threads: int = 2, device: str = "cpu") -> np.ndarray:
        """Codes (N, L) uint16: the nearest code in each slice."""
        slices = np.split(self._rotated(x_ND), len(self.sizes), axis=1)
        columns = [
            assign(np.ascontiguousarray(slice_NW), [codebook_KW], threads=threads, device=device)
            for slice_NW, codebook_KW in zip(slices, self.codebooks, strict=True)
        ]
        return np.concatenate(columns, axis=1)

    def decode(self, codes_NL: np.ndarray) -> np.ndarray:
        """The slices' codes side by side, rotated back; (N, D) float32."""
        slices = [codebook_KW[codes_NL[:, level]] for level, codebook_KW in enumerate(self.codebooks)]
        return (np.concatenate(slices, axis=1) @ self.rotation_DD)[:, : self.dims]

    def to_codebook(self) -> Codebook:
        """As plain data, to be saved."""
        weights = {"rotation": self.rotation_DD}
        return Codebook(self.kind, self.codebooks, self.width, weights=weights, notes=self.notes)

    @classmethod
    def from_codebook(cls, codebook: Codebook) -> Self:
        """Back from plain data."""
        return cls(
            sizes=codebook.sizes,
            rotation_DD=codebook.weights["rotation"],
            codebooks=codebook.codebooks,
            dims=codebook.width,
            notes=dict(codebook.notes),
        )

    def _rotation(self, padded_ND: np.ndarray, threads: int) -> np.ndarray:
        import faiss

        from prerank_tools.quantizers.rkmeans import faiss_threads

        width = padded_ND.shape[1]
        opq = faiss.OPQMatrix(width, len(self.sizes))
        opq.niter = self.iterations
        bits = max(1, int(np.log2(max(self.sizes))))
        opq.pq = faiss.ProductQuantizer(width, len(self.sizes), bits)
        opq.pq.cp.min_points_per_centroid = 1
        with faiss_threads(threads):
            opq.train(padded_ND)
        return faiss.vector_to_array(opq.A).reshape(width, width).copy()

    def _rotated(self, x_ND: np.ndarray) -> np.ndarray:
        """x R^T in float64 blocks of one shape, so that no row depends on its neighbours; float32."""
        turned_ND = np.empty((len(x_ND), len(self.rotation_DD)), dtype=np.float32)
        matrix_DD = self.rotation_DD.T.astype(np.float64)
        for start in range(0, len(x_ND), BLOCK):
            block_ND = self._padded(x_ND[start : start + BLOCK]).astype(np.float64)
            rows = len(block_ND)
            block_ND = np.pad(block_ND, ((0, BLOCK - rows), (0, 0)))
            turned_ND[start : start + rows] = (block_ND @ matrix_DD)[:rows]
        return turned_ND

    def _padded(self, x_ND: np.ndarray) -> np.ndarray:
        extra = -x_ND.shape[1] % len(self.sizes)
        return np.ascontiguousarray(np.pad(x_ND.astype(np.float32), ((0, 0), (0, extra))))
