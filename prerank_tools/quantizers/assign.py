"""Residual assignment: the nearest code of every level, exactly, the same on every machine and batch size.

What is computed is defined here in float64 (`assign_exact`): r_0 = x, code_l = argmin_k |r_l - c_lk|^2,
r_{l+1} = r_l - c_l[code_l]. Faster paths (`assign_cpu`, `assign_torch`, `assign_triton`) find the candidates
that their rounding error cannot rule out, and settle those as this file does. A tie goes to the lowest code.
"""
# N items, D dims, L levels, K codes of a level, B beam width

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EXACT_BLOCK = 4_096  # rows of a float64 score block
SMALL_WORK = 1_000_000_000  # N * D * codes under which starting the fast path costs more than it saves
NEAR_TIE = 1e-11  # relative: far above float64 error, far below float32's
COARSE_TIE = 1e-10  # what the faster paths hand to `assign_exact`


def assign(
    x_ND: np.ndarray, codebooks: Sequence[np.ndarray], *, threads: int = 2, device: str = "cpu"
) -> np.ndarray:
    """Codes (N, L) uint16 of `x_ND` (float32, float16 or int8), greedy by level as in RQ-KMeans.

    Equal to `assign_exact` row for row, whatever the batch, the thread count or the device.
    """
    if device != "cpu" and len(codebooks) <= 15:  # a doubt bit a level
        from prerank_tools.quantizers.assign_torch import assign_torch

        return assign_torch(x_ND, codebooks, device=device)
    if x_ND.size * sum(map(len, codebooks)) <= SMALL_WORK:
        return assign_exact(x_ND, codebooks)
    from prerank_tools.quantizers.assign_cpu import assign_cpu

    return assign_cpu(x_ND, codebooks, threads=threads)


def assign_exact(x_ND: np.ndarray, codebooks: Sequence[np.ndarray]) -> np.ndarray:
    """The definition, in float64; (N, L) uint16. Distances within `NEAR_TIE` are summed in index order."""
    codes_NL = np.empty((len(x_ND), len(codebooks)), dtype=np.uint16)
    for start in range(0, len(x_ND), EXACT_BLOCK):
        r_ND = x_ND[start : start + EXACT_BLOCK].astype(np.float64)
        for level, codebook_KD in enumerate(codebooks):
            codebook_KD = codebook_KD.astype(np.float64)
            code_N = nearest(r_ND, codebook_KD)
            codes_NL[start : start + EXACT_BLOCK, level] = code_N
            r_ND -= codebook_KD[code_N]
    return codes_NL


def nearest(r_ND: np.ndarray, codebook_KD: np.ndarray) -> np.ndarray:
    """The nearest code of each float64 row, ties to the lowest; (N,) int64."""
    norm_K = np.einsum("kd,kd->k", codebook_KD, codebook_KD)
    score_NK = norm_K - 2.0 * (r_ND @ codebook_KD.T)
    code_N = score_NK.argmin(axis=1)
    scale_N = np.einsum("nd,nd->n", r_ND, r_ND) + norm_K.max(initial=0.0)
    limit_N = score_NK.min(axis=1) + NEAR_TIE * scale_N
    close_NK = score_NK <= limit_N[:, None]
    for row in np.flatnonzero(close_NK.sum(axis=1) > 1):
        candidates = np.flatnonzero(close_NK[row])
        code_N[row] = candidates[_ordered_distance(r_ND[row], codebook_KD[candidates]).argmin()]
    return code_N


def decode(codes_NL: np.ndarray, codebooks: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of the chosen codes, (N, D) float32, added in float64 so that level order does not round."""
    x_ND = np.zeros((len(codes_NL), codebooks[0].shape[1]), dtype=np.float64)
    for level, codebook_KD in enumerate(codebooks):
        x_ND += codebook_KD[codes_NL[:, level]]
    return x_ND.astype(np.float32)


def assign_beam(x_ND: np.ndarray, codebooks: Sequence[np.ndarray], *, beam: int) -> np.ndarray:
    """Beam search over whole paths (faiss ResidualQuantizer's encoder); codes (N, L) uint16.

    Lowers the final error, but an item's prefix is then no longer its nearest coarse code: the hierarchy
    weakens. Equal errors keep the path that comes first in code order.
    """
    blocks = [
        _beam_block(x_ND[start : start + 512].astype(np.float64), codebooks, beam)[0][:, 0]
        for start in range(0, len(x_ND), 512)
    ]
    return np.concatenate(blocks) if blocks else np.empty((0, len(codebooks)), dtype=np.uint16)


def assign_scaled(x_ND: np.ndarray, codebooks: Sequence[np.ndarray]) -> np.ndarray:
    """As `assign_exact`, but each level sees the residual scaled to length 1 (TorchEasyRec's option)."""
    codes_NL = np.empty((len(x_ND), len(codebooks)), dtype=np.uint16)
    for start in range(0, len(x_ND), EXACT_BLOCK):
        r_ND = x_ND[start : start + EXACT_BLOCK].astype(np.float64)
        for level, codebook_KD in enumerate(codebooks):
            codebook_KD = codebook_KD.astype(np.float64)
            code_N = nearest(r_ND, codebook_KD)
            codes_NL[start : start + EXACT_BLOCK, level] = code_N
            r_ND -= codebook_KD[code_N]
            r_ND /= np.maximum(np.sqrt(np.square(r_ND).sum(axis=1, keepdims=True)), 1e-12)
    return codes_NL


def beam_residuals(
    x_ND: np.ndarray, codebooks: Sequence[np.ndarray], *, beam: int, rows: int, seed: int
) -> np.ndarray:
    """What the kept paths of all rows leave, (at most `rows`, D) float32: the next level's fit set."""
    take_N = np.sort(np.random.default_rng(seed).permutation(len(x_ND))[: max(1, rows // beam)])
    blocks = [
        _beam_block(x_ND[take_N[start : start + 512]].astype(np.float64), codebooks, beam)[1]
        for start in range(0, len(take_N), 512)
    ]
    return np.concatenate([block.reshape(-1, x_ND.shape[1]) for block in blocks]).astype(np.float32)


def _beam_block(
    x_ND: np.ndarray, codebooks: Sequence[np.ndarray], beam: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best paths (N, B, L) of each row, best first, and what they leave (N, B, D)."""
    rows_N1 = np.arange(len(x_ND))[:, None]
    r_NBD, path_NBL = x_ND[:, None, :], np.zeros((len(x_ND), 1, 0), dtype=np.uint16)
    for codebook_KD in codebooks:
        codebook_KD = codebook_KD.astype(np.float64)
        norm_K = np.einsum("kd,kd->k", codebook_KD, codebook_KD)
        error_NBK = (r_NBD**2).sum(-1)[:, :, None] + norm_K - 2.0 * (r_NBD @ codebook_KD.T)
        flat_NX = error_NBK.reshape(len(x_ND), -1)
        # Sorting the winners by index first makes the stable sort by error break ties in path order.
        keep_NB = np.sort(np.argpartition(flat_NX, min(beam, flat_NX.shape[1]) - 1, axis=1)[:, :beam], axis=1)
        order_NB = np.argsort(flat_NX[rows_N1, keep_NB], axis=1, kind="stable")
        parent_NB, code_NB = np.divmod(keep_NB[rows_N1, order_NB], len(codebook_KD))
        r_NBD = r_NBD[rows_N1, parent_NB] - codebook_KD[code_NB]
        path_NBL = np.concatenate(
            [path_NBL[rows_N1, parent_NB], code_NB[..., None].astype(np.uint16)], axis=2
        )
    return path_NBL, r_NBD


def _ordered_distance(r_D: np.ndarray, codebook_KD: np.ndarray) -> np.ndarray:
    """Squared distances summed strictly from the first dimension to the last: one result on every machine."""
    return np.add.accumulate(np.square(codebook_KD - r_D), axis=1)[:, -1]
