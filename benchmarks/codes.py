"""Codes of two sets of vectors under codebooks of the first: how much a difference between them matters."""

from __future__ import annotations

import faiss
import numpy as np


def residual_codes(x_ND: np.ndarray, y_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N, 3) of both under residual k-means codebooks of 3 x 256 fitted on x."""
    codes_x, codes_y, rest_x, rest_y = [], [], x_ND.copy(), y_ND.copy()
    for level in range(3):
        kmeans = faiss.Kmeans(x_ND.shape[1], 256, niter=20, seed=level)
        kmeans.train(rest_x)
        for rest, codes in ((rest_x, codes_x), (rest_y, codes_y)):
            codes.append(kmeans.index.search(rest, 1)[1][:, 0])
            rest -= kmeans.centroids[codes[-1]]
    return np.stack(codes_x, 1), np.stack(codes_y, 1)
