"""Joint refinement of additive codebooks: codes by beam search, then all codebooks by least squares, in turn.

Greedy fitting never goes back to an earlier level. Alternating does (LSQ: Martinez et al., ECCV 2016), and
noise on the codebooks that dies away lets it leave the greedy fit's valley (SR-D of LSQ++: Martinez et al.,
ECCV 2018). Encoding with the same beam instead of local search, and its noise of the residual's size: ours.
"""
# N items (n in a block), D dims, L levels, K codes of a level, B beam width

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

CELLS = 1 << 23  # path scores held at once
SWEEPS = 3  # over the levels, a round: the next round goes on from there
PRIOR = 0.3  # items' worth of weight on a code's place of the round before: rare codes do not jump
QUIET = 0.15  # share of the rounds, the last, without noise


def refine(
    x_ND: np.ndarray, codebooks: Sequence[np.ndarray], *, beam: int, rounds: int, noise: float, seed: int
) -> tuple[np.ndarray, ...]:
    """Codebooks (K, D) float32 of lower error under `beam`, after so many rounds; on CPU.

    `noise` is its first height in standard deviations of the error, a level's share. The codebooks with the
    lowest error of all rounds are returned, so never worse ones than those given.
    """
    x = torch.from_numpy(np.ascontiguousarray(x_ND, dtype=np.float32))
    levels = [torch.from_numpy(np.array(codebook_KD, dtype=np.float32)) for codebook_KD in codebooks]
    draw = torch.Generator().manual_seed(seed)
    best, least = levels, torch.inf
    for number in range(rounds + 1):
        codes_NL = beam_codes(x, levels, beam)
        r_ND = x - sum(codebook_KD[codes_NL[:, level]] for level, codebook_KD in enumerate(levels))
        error = float(r_ND.square().sum(dtype=torch.float64))
        if error < least:
            best, least = levels, error
        levels, r_ND = _least_squares(levels, codes_NL, r_ND)
        height = noise * max(0.0, 1 - number / max(1.0, (1 - QUIET) * rounds)) ** 0.5
        if height:
            std_D = height * r_ND.std(dim=0) / len(levels)
            levels = [c_KD + std_D * torch.randn(c_KD.shape, generator=draw) for c_KD in levels]
    return tuple(codebook_KD.numpy() for codebook_KD in best)


def beam_codes(x_ND: torch.Tensor, levels: Sequence[torch.Tensor], beam: int) -> torch.Tensor:
    """As `assign_beam`, in float32 from products of codes: (N, L) int64, near ties as they fall."""
    widest = max(len(codebook_KD) for codebook_KD in levels)
    rows = max(64, CELLS // (beam * widest))
    # A float32 product of two blocks may round otherwise than of one: the blocks do not depend on threads.
    cross = [[2.0 * above_KD @ here_KD.T for above_KD in levels[:at]] for at, here_KD in enumerate(levels)]
    return torch.cat([_paths(x_nD, levels, cross, beam) for x_nD in x_ND.split(rows)])


def _paths(
    x_nD: torch.Tensor, levels: Sequence[torch.Tensor], cross: list[list[torch.Tensor]], beam: int
) -> torch.Tensor:
    """The best path of each row: |x - sum c|^2 grows by |c|^2 - 2 x c + 2 c (codes chosen above)."""
    error_nB = torch.zeros(len(x_nD), 1)
    path_nBL = torch.zeros(len(x_nD), 1, 0, dtype=torch.int64)
    for level, codebook_KD in enumerate(levels):
        own_nK = codebook_KD.square().sum(1) - 2.0 * x_nD @ codebook_KD.T
        score_nBK = own_nK[:, None, :] + error_nB[:, :, None]
        for above, product_KK in enumerate(cross[level]):
            score_nBK += product_KK[path_nBL[:, :, above]]
        error_nB, index_nB = _smallest(score_nBK.flatten(1), beam if level + 1 < len(levels) else 1)
        parent_nB, code_nB = index_nB // len(codebook_KD), index_nB % len(codebook_KD)
        kept_nBL = path_nBL.gather(1, parent_nB[:, :, None].expand(-1, -1, level))
        path_nBL = torch.cat([kept_nBL, code_nB[:, :, None]], dim=2)
    return path_nBL[:, 0]


def _smallest(score_nX: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, places) of the `kept` smallest of each row; one alone is a plain minimum, which is faster."""
    if kept == 1:
        value_n1, place_n1 = score_nX.min(dim=1, keepdim=True)
        return value_n1, place_n1
    value_nB, place_nB = score_nX.topk(min(kept, score_nX.shape[1]), largest=False)
    return value_nB, place_nB


def _least_squares(
    levels: Sequence[torch.Tensor], codes_NL: torch.Tensor, r_ND: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(codebooks, error left) after Gauss-Seidel sweeps: a code moves by the mean error of its items."""
    levels, r_ND = [codebook_KD.clone() for codebook_KD in levels], r_ND.clone()
    for _ in range(SWEEPS):
        for level, codebook_KD in enumerate(levels):
            code_N = codes_NL[:, level]
            count_K = torch.bincount(code_N, minlength=len(codebook_KD))
            step_KD = torch.zeros_like(codebook_KD).index_add_(0, code_N, r_ND) / (count_K[:, None] + PRIOR)
            codebook_KD += step_KD
            r_ND -= step_KD[code_N]
    return levels, r_ND
