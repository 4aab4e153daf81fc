"""Rows in doubt settled in float64: near ties that the float16 products of a GPU cannot tell apart."""
# R rows in doubt (r in a block), D dims, K codes of a level

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from prerank_tools.quantizers.assign import COARSE_TIE, assign_exact
from prerank_tools.quantizers.assign_levels import MANY, Guessed, Levels, has_triton

DOUBT_BLOCK = 1 << 17  # rows measured in float64 at once
# Tells code and runner-up apart in float64 at one level, for the given rows.
Verify = Callable[[torch.Tensor, torch.Tensor, Guessed, Levels, int], None]


def settle(x_nD: torch.Tensor, guessed: Guessed, levels: Levels, *, verify: Verify | None = None) -> int:
    """Measure rows in doubt in float64 and correct their codes in place; returns how many needed the CPU.

    Two codes are told apart by one dot product; among more, all are measured. A corrected code changes the
    residual, so the levels below are then open as well.
    """
    verify = verify or best_verify(levels)
    unsure_n = torch.zeros_like(guessed.doubt_n, dtype=torch.bool)
    for level in range(levels.shape[0]):
        both_n = guessed.doubt_n >> level & (1 | 1 << MANY)
        two_r = (both_n == 1).nonzero()[:, 0]
        if len(two_r):
            verify(x_nD, two_r, guessed, levels, level)
        for at_r in (guessed.doubt_n >> (level + MANY) & 1).nonzero()[:, 0].split(DOUBT_BLOCK):
            r_rD = x_nD[at_r].double()
            for earlier in range(level):
                r_rD -= levels.exact[earlier][guessed.codes_nL[at_r, earlier].long()]
            code_r, close_r = _nearest64(r_rD, levels.exact[level])
            moved_r = (code_r != guessed.codes_nL[at_r, level]).int()
            guessed.doubt_n[at_r] |= moved_r * _below(level)
            guessed.codes_nL[at_r, level] = code_r
            unsure_n[at_r] |= close_r
    rows_R = unsure_n.nonzero()[:, 0]
    if len(rows_R):
        guessed.codes_nL[rows_R] = _on_the_cpu(x_nD[rows_R], levels)
    return len(rows_R)


def measure_all(x_rD: torch.Tensor, levels: Levels) -> tuple[torch.Tensor, int]:
    """(codes (r, L) int32, how many rows needed the CPU), every code of every level measured in float64.

    For few rows: no step waits for a count of rows.
    """
    r_rD, codes, close_r = x_rD.double(), [], torch.zeros(len(x_rD), dtype=torch.bool, device=x_rD.device)
    for c_KD in levels.exact:
        code_r, near_r = _nearest64(r_rD, c_KD)
        codes.append(code_r)
        close_r |= near_r
        r_rD -= c_KD[code_r.long()]
    codes_rL = torch.stack(codes, 1)
    rows_R = close_r.nonzero()[:, 0]
    if len(rows_R):
        codes_rL[rows_R] = _on_the_cpu(x_rD[rows_R], levels)
    return codes_rL, len(rows_R)


def _on_the_cpu(x_RD: torch.Tensor, levels: Levels) -> torch.Tensor:
    codebooks = [c_KD.float().cpu().numpy() for c_KD in levels.exact]
    settled_RL = assign_exact(x_RD.float().cpu().numpy(), codebooks)
    return torch.from_numpy(settled_RL.astype(np.int32)).to(x_RD.device)


def _below(level: int) -> int:
    """Doubt bits that leave every level below open to all codes."""
    return (0x7FFF >> (level + 1) << (level + 1)) << MANY


def best_verify(levels: Levels) -> Verify:
    """The kernel where Triton can run it, else plain torch."""
    if has_triton(levels):
        from prerank_tools.quantizers.assign_triton import verify_triton

        return verify_triton
    return verify_torch


def verify_torch(
    x_nD: torch.Tensor, at_r: torch.Tensor, guessed: Guessed, levels: Levels, level: int
) -> None:
    """Code or runner-up: the sign of |r - a|^2 - |r - b|^2 in float64; what is too close stays open."""
    for at in at_r.split(DOUBT_BLOCK):
        r_rD = x_nD[at].double()
        for earlier in range(level):
            r_rD -= levels.exact[earlier][guessed.codes_nL[at, earlier].long()]
        a_rD = levels.exact[level][guessed.codes_nL[at, level].long()]
        b_rD = levels.exact[level][guessed.runner_nL[at, level].long()]
        lead_r = ((a_rD + b_rD - 2.0 * r_rD) * (a_rD - b_rD)).sum(1)
        scale_r = (r_rD.square() + a_rD.square() + b_rD.square()).sum(1)
        record_lead(at, lead_r, COARSE_TIE * scale_r, guessed, level)


def record_lead(
    at_r: torch.Tensor, lead_r: torch.Tensor, close_r: torch.Tensor, guessed: Guessed, level: int
) -> None:
    """Take the runner-up where it is nearer, and open the levels below; leave open what is too close."""
    open_r = lead_r.abs() <= close_r
    swap_r = (lead_r > 0) & ~open_r
    runner_r = guessed.runner_nL[at_r, level]
    guessed.codes_nL[at_r, level] = torch.where(swap_r, runner_r, guessed.codes_nL[at_r, level])
    guessed.doubt_n[at_r] |= open_r.int() << (level + MANY) | swap_r.int() * _below(level)


def _nearest64(r_rD: torch.Tensor, c_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(nearest codes int32, whether the second is too close for float64 sums in another order)."""
    if len(c_KD) == 1:
        nothing_r = torch.zeros(len(r_rD), dtype=torch.int32, device=r_rD.device)
        return nothing_r, nothing_r.bool()
    norm_K = c_KD.square().sum(1)
    score_rK = torch.addmm(norm_K, r_rD, c_KD.T, alpha=-2.0)
    least_r, code_r = score_rK.min(1)
    next_r = score_rK.scatter_(1, code_r[:, None], torch.inf).amin(1)  # topk would sort
    scale_r = r_rD.square().sum(1) + norm_K.max()
    return code_r.int(), next_r - least_r <= COARSE_TIE * scale_r
