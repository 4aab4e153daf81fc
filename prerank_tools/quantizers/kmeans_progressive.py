"""k-means that begins on few principal axes: on residuals with outliers a random start wastes its codes."""

# N items, D dims, K codes
from __future__ import annotations

from typing import Any

import numpy as np

from prerank_tools.quantizers.rkmeans import POINTS_PER_CODE, faiss_threads


def kmeans_progressive(
    x_ND: np.ndarray, size: int, *, iterations: int, seed: int, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """(centroids_KD, nearest centroid of every row) of faiss' progressive-dimension k-means.

    It is what faiss' ResidualQuantizer trains with: PCA, then k-means on ever more axes, each from the last.
    The same for every thread count.
    """
    import faiss

    x_ND = np.ascontiguousarray(x_ND, dtype=np.float32)
    # Products of matrices round by the number of threads, k-means does not: axes are found on one.
    with faiss_threads(1):
        pca = _principal_axes(x_ND)
        turned_ND = pca.apply(x_ND)
    with faiss_threads(threads):
        clustering = faiss.ProgressiveDimClustering(x_ND.shape[1], size)
        clustering.niter, clustering.seed, clustering.apply_pca = iterations, seed, False
        clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, POINTS_PER_CODE
        clustering.progressive_dim_steps = min(10, x_ND.shape[1])
        # The stubs describe a wrapper that this class does not have.
        data, factory = faiss.swig_ptr(turned_ND), faiss.ProgressiveDimIndexFactory()
        clustering.train(len(x_ND), data, factory)  # type: ignore[call-overload]
        turned_KD = faiss.vector_to_array(clustering.centroids).reshape(size, -1)
    with faiss_threads(1):
        centroids_KD = pca.reverse_transform(turned_KD)
    with faiss_threads(threads):
        index = faiss.IndexFlatL2(x_ND.shape[1])
        index.add(centroids_KD)
        _, code_N1 = index.search(x_ND, 1)
    return centroids_KD, code_N1[:, 0]


def _principal_axes(x_ND: np.ndarray) -> Any:
    """faiss' PCA; of copies of the rows where they are fewer than dims, which it refuses: same axes."""
    import faiss

    rows, dims = x_ND.shape
    pca = faiss.PCAMatrix(dims, dims)
    pca.train(np.tile(x_ND, (-(-dims // rows), 1)) if rows < dims else x_ND)
    return pca
