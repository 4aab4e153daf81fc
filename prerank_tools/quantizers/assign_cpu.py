"""Exact residual assignment on CPU at the speed of one bf16 product.

|r_l - c|^2 = |r_l|^2 + |c|^2 - 2 x.c + 2 sum_j c_j.c over the codes c_j chosen before: one product of x with
all levels and small code-by-code tables give every level's distances without residuals (ours). The product is
bf16; a Cauchy-Schwarz bound on its error says which codes may still be the nearest, and only those are
measured in float64. Where the CPU has a matrix unit that we drive ourselves, its float32 sums are kept.
"""
# N items (n in a block), D dims, L levels, K codes of a level, M of all levels, P of earlier levels

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from prerank_tools.quantizers.assign import assign_exact
from prerank_tools.quantizers.assign_kernels import Tables, round_rows, settle, tile_group
from prerank_tools.quantizers.assign_simd import WIDTH
from prerank_tools.tiles import SIDE, STEP, aligned, have_tiles, paired, tile_shapes

TABLE_BYTES = 8 << 20  # tables beyond this fall out of the cache; residuals are cheaper then
BLOCK_BYTES = 3 << 19  # the block of products that stays in a 2 MB L2
TILE_ROWS = 2048  # rows of a block where the matrix unit takes them apart itself
UNIT = 2.0**-24  # rounding of float32
FARTHEST = np.float32(3.0e38)  # the distance of a code that only fills a vector

Multiply = Literal["tiles", "bf16", "float32"]


def assign_cpu(x_ND: np.ndarray, codebooks: Sequence[np.ndarray], *, threads: int = 2) -> np.ndarray:
    """Codes (N, L) uint16, equal to `assign_exact`; `x_ND` float32, float16 or int8."""
    codes_NL = np.empty((len(x_ND), len(codebooks)), dtype=np.uint16)
    plan = _plan(codebooks)
    scratch = threading.local()  # fresh pages for every block would cost as much as the argmin

    def block(start: int) -> None:
        if not hasattr(scratch, "buffers"):
            scratch.buffers = plan.buffers(x_ND.shape[1])
        x_nD = np.ascontiguousarray(x_ND[start : start + plan.rows], dtype=np.float32)
        codes_NL[start : start + plan.rows] = _assign_block(x_nD, plan, codebooks, scratch.buffers)

    with _one_torch_thread_each(threads) as pool:
        for _ in pool.map(block, range(0, len(x_ND), plan.rows)):
            pass
    return codes_NL


@dataclass(frozen=True)
class _Group:
    """The levels that share one product; `shift_D` makes its operands small, which changes no distance.

    `weight` (D, M) is for `torch.mm`, or `tiles.paired` for the matrix unit.
    """

    first: int
    tables: Tables
    shift_D: np.ndarray
    weight: torch.Tensor | np.ndarray


@dataclass(frozen=True)
class _Plan:
    groups: tuple[_Group, ...]
    flat_MD: np.ndarray
    key: tuple[Any, ...]  # level sizes, how to multiply, the table ceiling

    @property
    def multiply(self) -> Multiply:
        how: Multiply = self.key[1]
        return how

    @property
    def rows(self) -> int:
        """Of a block: as many as keep the products in the cache."""
        width = (2 if self.multiply == "bf16" else 4) * self.widest
        return TILE_ROWS if self.multiply == "tiles" else max(64, BLOCK_BYTES // width // 64 * 64)

    @property
    def widest(self) -> int:
        return max(group.weight.shape[1] for group in self.groups)

    def buffers(self, dims: int) -> tuple[np.ndarray, np.ndarray]:
        """One thread's operand and products."""
        if self.multiply == "tiles":
            operand_SD = np.zeros((2 * SIDE, -(-dims // STEP) * STEP), dtype=np.uint16)
            return aligned(operand_SD), aligned(np.zeros(2 * SIDE * self.widest, dtype=np.float32))
        kind = np.uint16 if self.multiply == "bf16" else np.float32
        return np.empty((self.rows, dims), dtype=kind), np.empty(self.rows * self.widest, dtype=kind)


_last: list[_Plan] = []  # a job asks for the same codebooks once a shard


def _plan(codebooks: Sequence[np.ndarray]) -> _Plan:
    """All levels under one product while the tables stay in the cache, else one product a level."""
    flat_MD = np.ascontiguousarray(np.concatenate(codebooks), dtype=np.float32)
    sizes = tuple(len(codebook_KD) for codebook_KD in codebooks)
    key = (sizes, multiplier(), TABLE_BYTES)
    for plan in _last[:1]:
        if plan.key == key and np.array_equal(plan.flat_MD, flat_MD):
            return plan
    _last[:] = [_new_plan(codebooks, flat_MD, key)]
    return _last[0]


def _new_plan(codebooks: Sequence[np.ndarray], flat_MD: np.ndarray, key: tuple[Any, ...]) -> _Plan:
    sizes, multiply, _ = key
    starts = np.cumsum([0, *sizes]).tolist()
    table_bytes = 4 * sum(start * size for start, size in zip(starts, sizes, strict=False))
    cuts = [0, len(sizes)] if table_bytes <= TABLE_BYTES else list(range(len(sizes) + 1))
    groups = [_group(codebooks[a:b], a, starts[a:b], multiply) for a, b in itertools.pairwise(cuts)]
    return _Plan(tuple(groups), flat_MD, key)


def _group(codebooks: Sequence[np.ndarray], first: int, starts: Sequence[int], multiply: Multiply) -> _Group:
    shift_D = codebooks[0].mean(axis=0, dtype=np.float64).astype(np.float32)
    exact = [codebook_KD.astype(np.float64) for codebook_KD in codebooks]
    exact[0] = exact[0] - shift_D
    kind = torch.float32 if multiply == "float32" else torch.bfloat16
    weights = [torch.from_numpy(-2.0 * c_KD).to(kind) for c_KD in exact]
    rounded = [-0.5 * weight_KD.double().numpy() for weight_KD in weights]
    made = [_level(c_KD, rounded[depth], exact[:depth]) for depth, c_KD in enumerate(exact)]
    width_L = np.array([table_PK.shape[1] for table_PK, _ in made])
    size_L = np.array([table_PK.size for table_PK, _ in made])
    tables = Tables(
        start_L=np.array(starts),
        width_L=width_L,
        column_L=np.cumsum(width_L) - width_L,
        table_L=np.cumsum(size_L) - size_L,
        table_T=np.concatenate([table_PK.ravel() for table_PK, _ in made]),
        bound_L4=np.stack([bound for _, bound in made]),
        norm_M=np.concatenate([np.square(c_KD).sum(axis=1) for c_KD in exact]),
    )
    weight_MD = torch.cat([_padded(weight_KD) for weight_KD in weights])
    weight = _paired(weight_MD) if multiply == "tiles" else weight_MD.t()
    return _Group(first, tables, shift_D, weight)


def _padded(weight_KD: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(weight_KD, (0, 0, 0, -len(weight_KD) % WIDTH))


def _paired(weight_MD: torch.Tensor) -> np.ndarray:
    """Zero dims make the blocks of the matrix unit whole."""
    whole_MD = torch.nn.functional.pad(weight_MD, (0, -weight_MD.shape[1] % STEP))
    return paired(whole_MD.view(torch.int16).numpy())


def _level(
    c_KD: np.ndarray, rounded_KD: np.ndarray, earlier: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The table (P, K padded) and the four factors of the error bound of one level.

    |c|^2 is in the rows of the first earlier level already, and is the only row where there is none.

    A distance errs by at most ex * bound[0] + |r| * bound[1] + |x| * bound[2] + bound[3], ex being what bf16
    took from the row and r its residual:
    |2 r.c - 2 (x'.c' - sum c_j.c')| <= 2 (|x - x'| |c'| + |r| |c - c'|), plus sums.
    Tables made with the rounded c leave r alone to meet c - c'.
    """
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
    padding = (0, 0), (0, -len(c_KD) % WIDTH)
    table_PK = np.pad(table_PK.astype(np.float32), padding, constant_values=FARTHEST)
    return table_PK, np.array(bound, np.float32)


def _assign_block(
    x_nD: np.ndarray, plan: _Plan, codebooks: Sequence[np.ndarray], buffers: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    picked_nL = np.zeros((len(x_nD), len(codebooks)), dtype=np.int32)  # rows of the flat codebook
    unsure_n = np.zeros(len(x_nD), dtype=np.bool_)
    for group in plan.groups:
        _assign_group(x_nD, group, plan.flat_MD, picked_nL, unsure_n, buffers)
    starts_L = np.concatenate([group.tables.start_L for group in plan.groups])
    codes_nL = (picked_nL - starts_L).astype(np.uint16)
    if unsure_n.any():
        codes_nL[unsure_n] = assign_exact(x_nD[unsure_n], codebooks)
    return codes_nL


def _assign_group(
    x_nD: np.ndarray,
    group: _Group,
    flat_MD: np.ndarray,
    picked_nL: np.ndarray,
    unsure_n: np.ndarray,
    buffers: tuple[np.ndarray, np.ndarray],
) -> None:
    """Pick the codes of a group's levels; bf16 is passed as uint16 bits, NumPy having no name for it."""
    shift = group.shift_D, np.float32(np.linalg.norm(group.shift_D) * 1.001)
    place = group.tables, flat_MD, picked_nL, group.first
    if isinstance(group.weight, np.ndarray):
        operand_SD, space = buffers
        product_SM = space[: len(operand_SD) * group.weight.shape[1]].reshape(len(operand_SD), -1)
        tile_group(x_nD, *shift, group.weight, *place, unsure_n, operand_SD, product_SM, tile_shapes())
        return
    operand_nD = buffers[0][: len(x_nD)]
    norms_n3 = round_rows(x_nD, *shift, flat_MD, picked_nL[:, : group.first], operand_nD)
    product_nM = buffers[1][: len(x_nD) * group.weight.shape[1]].reshape(len(x_nD), -1)
    torch.mm(_as_torch(operand_nD), group.weight, out=_as_torch(product_nM))
    settle(product_nM, group.tables, x_nD, flat_MD, picked_nL, group.first, norms_n3, unsure_n)


def _as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == np.float32:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def multiplier() -> Multiply:
    """How this CPU multiplies fastest; bf16 that is emulated is slower than float32."""
    if have_tiles():
        return "tiles"
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "float32"


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
