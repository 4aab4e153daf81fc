"""Residual assignment and fitting as faiss users write them: flat indexes in a loop, ResidualQuantizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import faiss
import numpy as np


def flat_loop(x_ND: np.ndarray, codebooks: Sequence[np.ndarray]) -> np.ndarray:
    """Search an IndexFlatL2 a level, subtract, go on."""
    r_ND, codes = x_ND, []
    for codebook_KD in codebooks:
        index = faiss.IndexFlatL2(x_ND.shape[1])
        index.add(codebook_KD)
        _, code_N1 = index.search(r_ND, 1)
        codes.append(code_N1[:, 0])
        r_ND = r_ND - codebook_KD[codes[-1]]
    return np.stack(codes, axis=1)


def residual_quantizer(
    codebooks: Sequence[np.ndarray], *, beam: int = 1, table: bool = False
) -> Callable[[np.ndarray], np.ndarray]:
    """`ResidualQuantizer.compute_codes` over given codebooks of 256 codes; `table` sets `use_beam_LUT`."""
    dims = codebooks[0].shape[1]
    quantizer = faiss.ResidualQuantizer(dims, len(codebooks), 8)
    faiss.copy_array_to_vector(np.concatenate(codebooks).ravel(), quantizer.codebooks)
    quantizer.is_trained = True
    quantizer.max_beam_size = beam
    quantizer.use_beam_LUT = int(table)
    if table:
        quantizer.compute_codebook_tables()
    return lambda x_ND: quantizer.compute_codes(x_ND)


def fit_loop(x_ND: np.ndarray, sizes: Sequence[int], *, iterations: int, seed: int) -> list[np.ndarray]:
    """`faiss.Kmeans` a level on what the levels above left."""
    r_ND, codebooks = x_ND, []
    for size in sizes:
        kmeans = faiss.Kmeans(x_ND.shape[1], size, niter=iterations, seed=seed)
        kmeans.train(r_ND)
        _, code_N1 = kmeans.index.search(r_ND, 1)
        codebooks.append(kmeans.centroids.copy())
        r_ND = r_ND - codebooks[-1][code_N1[:, 0]]
    return codebooks
