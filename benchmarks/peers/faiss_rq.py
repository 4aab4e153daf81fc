"""faiss' own quantizers behind fit / encode / decode: ResidualQuantizer with a beam, and ProductQuantizer."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np


class FaissQuantizer:
    """`beam` 0 is a ProductQuantizer of as many subspaces as levels; otherwise a ResidualQuantizer."""

    def __init__(self, sizes: tuple[int, ...], *, beam: int) -> None:
        self.sizes, self.beam = sizes, beam
        self.quantizer: Any = None

    def fit(
        self, x_ND: np.ndarray, *, seed: int = 0, threads: int = 2, device: str = "cpu"
    ) -> FaissQuantizer:
        faiss.omp_set_num_threads(threads)
        levels, bits = len(self.sizes), int(np.log2(self.sizes[0]))
        if self.beam:
            self.quantizer = faiss.ResidualQuantizer(x_ND.shape[1], levels, bits)
            self.quantizer.max_beam_size = self.beam
        else:
            self.quantizer = faiss.ProductQuantizer(x_ND.shape[1], levels, bits)
        self.quantizer.cp.seed = seed
        self.quantizer.cp.niter = 25
        self.quantizer.train(np.ascontiguousarray(x_ND, dtype=np.float32))
        return self

    def encode(self, x_ND: np.ndarray, *, threads: int = 2, device: str = "cpu") -> np.ndarray:
        faiss.omp_set_num_threads(threads)
        return self.quantizer.compute_codes(np.ascontiguousarray(x_ND, dtype=np.float32))

    def decode(self, codes_NL: np.ndarray) -> np.ndarray:
        return self.quantizer.decode(np.ascontiguousarray(codes_NL, dtype=np.uint8))
