"""Exact residual assignment on CPU at the speed of one bf16 product.

|r_l - c|^2 = |r_l|^2 + |c|^2 - 2 x.c + 2 sum_j c_j.c over the codes c_j chosen before: one product of x with
all levels and small code-by-code tables give every level's distances without residuals (ours). The product is
bf16; a Cauchy-Schwarz bound on its error says which codes may still be the nearest, and only those are
measured in float64.
"""
# N items (n in a block), D dims, L levels, K codes of a level, M of all levels, P of earlier levels

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prerank_tools.quantizers.assign import assign_exact
from prerank_tools.quantizers.assign_kernels import round_rows, settle_level

TABLE_BYTES = 8 << 20  # tables beyond this fall out of the cache; residuals are cheaper then
BLOCK_BYTES = 3 << 19  # the block of products that stays in a 2 MB L2
UNIT = 2.0**-24  # rounding of float32


def assign_cpu(x_ND: np.ndarray, codebooks: Sequence[np.ndarray], *, threads: int = 2) -> np.ndarray:
    """Codes (N, L) uint16, equal to `assign_exact`; `x_ND` float32, float16 or int8."""
    codes_NL = np.empty((len(x_ND), len(codebooks)), dtype=np.uint16)
    plan = _plan(codebooks)
    rows = max(64, BLOCK_BYTES // (2 * plan.widest) // 64 * 64)

    scratch = threading.local()  # fresh pages for every block would cost as much as the argmin

    def block(start: int) -> None:
        if not hasattr(scratch, "product"):
            scratch.operand = np.empty((rows, x_ND.shape[1]), dtype=np.uint16 if plan.key[1] else np.float32)
            scratch.product = np.empty((rows, plan.widest), dtype=scratch.operand.dtype)
        x_nD = np.ascontiguousarray(x_ND[start : start + rows], dtype=np.float32)
        buffers = scratch.operand[: len(x_nD)], scratch.product
        codes_NL[start : start + rows] = _assign_block(x_nD, plan, codebooks, buffers)

    with _one_torch_thread_each(threads) as pool:
        for _ in pool.map(block, range(0, len(x_ND), rows)):
            pass
    return codes_NL


@dataclass(frozen=True)
class _Level:
    """One level's constants: `norm_K` is |c|^2, `table_PK` 2 c_j.c per earlier code of the same product.

    |c|^2 is in the rows of the first earlier level already, and is the only row where there is none.

    A distance errs by at most ex * bound[0] + |r| * bound[1] + |x| * bound[2] + bound[3], ex being what bf16
    took from the row and r its residual: tables made with the rounded c leave r alone to meet c - c'.
    """

    start: int  # of this level in the flat codebook
    norm_K: np.ndarray
    table_PK: np.ndarray
    bound: np.ndarray


@dataclass(frozen=True)
class _Group:
    """The levels that share one product; `shift_D` makes its operands small, which changes no distance."""

    first: int
    levels: tuple[_Level, ...]
    shift_D: np.ndarray
    weight_DM: torch.Tensor


@dataclass(frozen=True)
class _Plan:
    groups: tuple[_Group, ...]
    flat_MD: np.ndarray
    key: tuple[Any, ...]  # level sizes, whether bf16, the table ceiling

    @property
    def widest(self) -> int:
        return max(group.weight_DM.shape[1] for group in self.groups)


_last: list[_Plan] = []  # a job asks for the same codebooks once a shard


def _plan(codebooks: Sequence[np.ndarray]) -> _Plan:
    """All levels under one product while the tables stay in the cache, else one product a level."""
    flat_MD = np.ascontiguousarray(np.concatenate(codebooks), dtype=np.float32)
    sizes = tuple(len(codebook_KD) for codebook_KD in codebooks)
    key = (sizes, fast_bf16(), TABLE_BYTES)
    for plan in _last[:1]:
        if plan.key == key and np.array_equal(plan.flat_MD, flat_MD):
            return plan
    _last[:] = [_new_plan(codebooks, flat_MD, key)]
    return _last[0]


def _new_plan(codebooks: Sequence[np.ndarray], flat_MD: np.ndarray, key: tuple[Any, ...]) -> _Plan:
    sizes, bf16, _ = key
    starts = np.cumsum([0, *sizes]).tolist()
    table_bytes = 4 * sum(start * size for start, size in zip(starts, sizes, strict=False))
    cuts = [0, len(sizes)] if table_bytes <= TABLE_BYTES else list(range(len(sizes) + 1))
    groups = [_group(codebooks[a:b], a, starts[a:b], bf16) for a, b in itertools.pairwise(cuts)]
    return _Plan(tuple(groups), flat_MD, key)


def _group(codebooks: Sequence[np.ndarray], first: int, starts: Sequence[int], bf16: bool) -> _Group:
    shift_D = codebooks[0].mean(axis=0, dtype=np.float64).astype(np.float32)
    exact = [codebook_KD.astype(np.float64) for codebook_KD in codebooks]
    exact[0] = exact[0] - shift_D
    weights = [torch.from_numpy(-2.0 * c_KD).to(torch.bfloat16 if bf16 else torch.float32) for c_KD in exact]
    levels = []
    for depth, c_KD in enumerate(exact):
        rounded_KD = -0.5 * weights[depth].double().numpy()
        levels.append(_level(c_KD, rounded_KD, exact[:depth], starts[depth]))
    return _Group(first, tuple(levels), shift_D, torch.cat(weights).t())


def _level(c_KD: np.ndarray, rounded_KD: np.ndarray, earlier: Sequence[np.ndarray], start: int) -> _Level:
    """Tables and bound: |2 r.c - 2 (x'.c' - sum c_j.c')| <= 2 (|x - x'| |c'| + |r| |c - c'|), plus sums."""
    norm_K = np.einsum("kd,kd->k", c_KD, c_KD)
    table_PK = norm_K[None]
    if earlier:
        table_PK = 2.0 * np.concatenate(earlier) @ rounded_KD.T
        table_PK[: len(earlier[0])] += norm_K
    largest = float(np.linalg.norm(rounded_KD, axis=1).max())
    rounding = float(np.linalg.norm(rounded_KD - c_KD, axis=1).max())
    largest_sum = float(norm_K.max()) + len(earlier) * float(np.abs(table_PK).max())
    bound = [2.02 * largest, 2.02 * rounding, (3 * c_KD.shape[1] + 64) * UNIT * largest]
    bound.append(8 * (len(earlier) + 4) * UNIT * largest_sum + 1e-30)
    return _Level(start, norm_K.astype(np.float32), table_PK.astype(np.float32), np.array(bound, np.float32))


def _assign_block(
    x_nD: np.ndarray, plan: _Plan, codebooks: Sequence[np.ndarray], buffers: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    operand_nD, space = buffers
    picked_nL = np.zeros((len(x_nD), len(codebooks)), dtype=np.int32)  # rows of the flat codebook
    unsure_n = np.zeros(len(x_nD), dtype=np.bool_)
    for group in plan.groups:
        shift = group.shift_D, np.float32(np.linalg.norm(group.shift_D) * 1.001)
        norms_n3 = round_rows(x_nD, *shift, plan.flat_MD, picked_nL[:, : group.first], operand_nD)
        product_nM = space.ravel()[: len(x_nD) * group.weight_DM.shape[1]].reshape(len(x_nD), -1)
        _product(operand_nD, group.weight_DM, product_nM)
        at = 0
        for depth, level in enumerate(group.levels):
            tables = (
                product_nM,
                at,
                level.norm_K,
                level.table_PK,
                level.bound,
                group.levels[0].start,
                level.start,
            )
            settle_level(*tables, x_nD, plan.flat_MD, picked_nL, group.first, depth, norms_n3, unsure_n)
            at += len(level.norm_K)
    starts_L = [level.start for group in plan.groups for level in group.levels]
    codes_nL = (picked_nL - np.array(starts_L, dtype=np.int32)).astype(np.uint16)
    if unsure_n.any():
        codes_nL[unsure_n] = assign_exact(x_nD[unsure_n], codebooks)
    return codes_nL


def _product(operand_nD: np.ndarray, weight_DM: torch.Tensor, out_nM: np.ndarray) -> None:
    """`operand @ weight` into `out_nM`; bf16 comes and goes as uint16 bits, NumPy having no name for it."""
    torch.mm(_as_torch(operand_nD), weight_DM, out=_as_torch(out_nM))


def _as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == np.float32:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; emulated it is slower than float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported())


@contextmanager
def _one_torch_thread_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Blocks run side by side, so a product inside one must not start threads of its own."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(max(1, threads), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool:
            yield pool
    finally:
        torch.set_num_threads(before)
