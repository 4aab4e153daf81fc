"""lucidrains' ResidualVQ behind fit / encode / decode: k-means init, EMA, dead-code restarts."""

from __future__ import annotations

import numpy as np
import torch
from vector_quantize_pytorch import ResidualVQ


class LucidrainsRVQ:
    """Codebooks alone, on the vectors as they are; `epochs` passes in batches of 1,024."""

    def __init__(self, sizes: tuple[int, ...], *, epochs: int = 20) -> None:
        self.sizes, self.epochs = sizes, epochs

    def fit(self, x_ND: np.ndarray, *, seed: int = 0, threads: int = 2, device: str = "cpu") -> LucidrainsRVQ:
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        self.net = ResidualVQ(
            dim=x_ND.shape[1],
            num_quantizers=len(self.sizes),
            codebook_size=self.sizes[0],
            kmeans_init=True,
            kmeans_iters=25,
            decay=0.99,
            threshold_ema_dead_code=2,
        ).train()
        x = torch.from_numpy(np.ascontiguousarray(x_ND, dtype=np.float32))
        with torch.no_grad():
            # k-means starts from the first batch, so that one is as large as ours may see.
            self.net(x[torch.randperm(len(x))[:16_384]][None])
            for _ in range(self.epochs):
                for rows in torch.randperm(len(x)).split(1_024):
                    self.net(x[rows][None])
        self.net.eval()
        return self

    def encode(self, x_ND: np.ndarray, *, threads: int = 2, device: str = "cpu") -> np.ndarray:
        torch.set_num_threads(threads)
        x = torch.from_numpy(np.ascontiguousarray(x_ND, dtype=np.float32))
        with torch.no_grad():
            blocks = [self.net(rows[None])[1][0] for rows in x.split(8_192)]
        return torch.cat(blocks).numpy().astype(np.uint16)

    def decode(self, codes_NL: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            codes = torch.from_numpy(codes_NL.astype(np.int64))[None]
            return self.net.get_output_from_indices(codes)[0].numpy()
