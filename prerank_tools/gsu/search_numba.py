"""Exact cosine top-K on the CPU: bf16 products of whole blocks, shortlists, a float64 re-check."""
# G groups, T blocks of candidates, C candidates, n behaviours of a group, V vectors, D dims, K kept, S recent

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numba.extending import overload

from prerank_tools.compiled import kernel
from prerank_tools.gsu.rank import (
    AHEAD,
    Past,
    count_vectors,
    finish_block,
    inverse_norm,
    past_of,
    stored_bits,
)
from prerank_tools.gsu.search import RECENT, Groups, TopK, empty_topk
from prerank_tools.gsu.search_short import search_short
from prerank_tools.gsu.select import LOWEST, WIDE, Shortlists, absorb
from prerank_tools.gsu.simd import fetch_row, unit_bf16_row
from prerank_tools.gsu.simtier import PAD_SIM, TIERS
from prerank_tools.tiles import (
    SIDE,
    STEP,
    aligned,
    have_tiles,
    multiply_32,
    round_32,
    tile_shapes,
    tiles_off,
    tiles_on,
)

CHUNK = 4096  # behaviours whose products are held at once
BLOCK = 256  # candidates of a user that pass over the history together
SHORT = 640  # a history this short is cheaper scored exactly, all of it, than selected from
FEW = 3  # so is any history, one behaviour after the other, for this few candidates
CAPACITY = 1024  # shortlist entries a candidate; a row that needs more is scored exactly
MAX_LOSS = 2.0**-8 * 1.001  # length of what rounding a unit vector to bf16 can lose


def topk_numba(
    table_VD: np.ndarray, groups: Groups, *, k: int = 50, recent: int = RECENT, threads: int = 2
) -> TopK:
    """`search.topk` on `threads` cores; scratch memory is bounded by the chunk, however long a history."""
    found = _unwritten(len(groups.candidate_rows_M), k, recent)
    table_VD = stored_bits(table_VD)
    before = torch.get_num_threads()
    parts = iter(_parts(groups, 1 if threads == 1 else threads * 8))
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(lambda _: _search(table_VD, groups, found, parts), range(threads)))
    torch.set_num_threads(before)
    return found


def count_tiers(sims_MK: np.ndarray) -> np.ndarray:
    """`simtier.simtier`, ten times as fast."""
    counts_MN = np.zeros((len(sims_MK), TIERS), dtype=np.uint8)
    _count_tiers(np.ascontiguousarray(sims_MK, dtype=np.float32), counts_MN)
    return counts_MN


def _unwritten(candidates: int, k: int, recent: int) -> TopK:
    """The arrays of `empty_topk`; each thread empties the rows that it then fills."""
    empty = empty_topk(0, k=k, recent=recent)
    return TopK(*(np.empty((candidates, *part.shape[1:]), dtype=part.dtype) for part in empty))


class _Blocks(NamedTuple):
    """Candidates `first_T` .. `last_T` of group `group_T`."""

    group_T: np.ndarray
    first_T: np.ndarray
    last_T: np.ndarray


class _Scratch(NamedTuple):
    """One thread's buffers, as large as the largest block needs and no larger than a chunk."""

    behaviors_nD: np.ndarray
    candidates_CD: np.ndarray
    pairs_PC: np.ndarray
    products_SS: np.ndarray
    keys: np.ndarray
    ids_CB: np.ndarray
    kept_CB: np.ndarray
    shapes: np.ndarray

    @classmethod
    def of(cls, width: int, groups: Groups, tiles: bool) -> _Scratch:
        asked = min(int(np.diff(groups.candidate_offsets).max()), BLOCK)
        n = _whole(min(int(np.diff(groups.history_offsets).max()), CHUNK), SIDE)
        c, width = _whole(asked, WIDE), _whole(width, STEP)
        return cls(
            behaviors_nD=aligned(np.zeros((SIDE if tiles else n, width), dtype=np.int16)),
            candidates_CD=aligned(np.zeros((c, width), dtype=np.int16)),
            pairs_PC=aligned(np.zeros((width // 2, c), dtype=np.int32)),
            products_SS=aligned(np.zeros((SIDE, SIDE), dtype=np.int32)),
            keys=aligned(np.zeros(n * c, dtype=np.int16)),
            ids_CB=np.empty((asked, CAPACITY), dtype=np.int32),
            kept_CB=np.empty((asked, CAPACITY), dtype=np.int16),
            shapes=tile_shapes(),
        )


def _parts(groups: Groups, parts: int) -> list[_Blocks]:
    """Runs of blocks with about equal work, for the threads to take."""
    asked, offsets = np.diff(groups.candidate_offsets), groups.candidate_offsets
    blocks = -(-asked // BLOCK)
    group_T = np.repeat(np.arange(len(asked)), blocks)
    first_T = offsets[group_T] + BLOCK * (
        np.arange(len(group_T)) - np.repeat(blocks.cumsum() - blocks, blocks)
    )
    last_T = np.minimum(first_T + BLOCK, offsets[group_T + 1])
    work = np.cumsum((last_T - first_T + 16.0) * (np.diff(groups.history_offsets)[group_T] + 64.0))
    cuts = np.searchsorted(work, work[-1] * np.arange(1, parts) / parts) if len(work) else []
    split = (np.split(column, np.unique(cuts).astype(int)) for column in (group_T, first_T, last_T))
    return [_Blocks(*columns) for columns in zip(*split, strict=True) if len(columns[0])]


def _search(table_VD: np.ndarray, groups: Groups, found: TopK, parts: Iterator[_Blocks]) -> None:
    """Search what is left of the parts: long blocks through shortlists, the others exactly as they stand."""
    scratch, k = None, found.positions_MK.shape[1]
    for blocks in parts:
        _empty_rows(found, blocks)
        history_T = np.diff(groups.history_offsets)[blocks.group_T]
        short_T = history_T <= max(SHORT, 2 * k)
        few_T = ~short_T & ((blocks.last_T - blocks.first_T <= FEW) | (2 * k > CAPACITY))
        long_T = ~short_T & ~few_T
        if short_T.any():
            search_short(table_VD, groups, found, *(column[short_T] for column in blocks))
        if few_T.any():
            _search_few(table_VD, groups, found, _Blocks(*(column[few_T] for column in blocks)))
        if long_T.any():
            scratch = scratch or _Scratch.of(table_VD.shape[1], groups, have_tiles())
            search = _search_long_tiles if have_tiles() else _search_long
            search(table_VD, groups, found, _Blocks(*(column[long_T] for column in blocks)), scratch)


def _search_long(
    table_VD: np.ndarray, groups: Groups, found: TopK, blocks: _Blocks, scratch: _Scratch
) -> None:
    """Blocks through products and shortlists, chunk by chunk of the history.

    As it stands the products are `torch.mm`'s, compiled they are those of the matrix unit.
    """
    chunk = len(scratch.keys) // len(scratch.candidates_CD)
    for t in range(len(blocks.group_T)):
        group, first, last = blocks.group_T[t], blocks.first_T[t], blocks.last_T[t]
        past, lists, loss_C = _open(table_VD, groups, group, first, last, scratch)
        n = len(past.rows_n)
        for start in range(0, n, chunk):
            stop = min(start + chunk, n)
            loss = _products(table_VD, past, start, stop, last - first, scratch)
            # Thresholds outlive their chunk: they may rest on its own rounding only if it is the only one.
            loss = loss if n <= chunk else max(loss, MAX_LOSS)
            lists.slack_C[:] = loss_C * (1 + loss) + loss + table_VD.shape[1] * 2.0**-23 + 1e-6
            keys_nC = _keys(scratch, stop - start, last - first)
            absorb(keys_nC, start, groups.visible_M[first:last], found.positions_MK.shape[1], lists)
        count_vectors(past)
        finish_block(table_VD, past, groups, first, last, lists, found)


def _products(
    table_VD: np.ndarray, past: Past, start: int, stop: int, candidates: int, scratch: _Scratch
) -> float:
    """Cosines of behaviours `start` .. `stop` in bf16 into `_keys`; the most that rounding a row lost."""
    behaviors_nD = scratch.behaviors_nD[: _whole(stop - start, SIDE)]
    lost_n = np.empty(stop - start, dtype=np.float32)
    _unit_rows(table_VD, past.rows_n, start, stop, past.inverse_n, behaviors_nD, lost_n)
    candidates_CD = scratch.candidates_CD[: _whole(candidates, WIDE)]
    keys_nC = torch.from_numpy(_keys(scratch, stop - start, candidates)).view(torch.bfloat16)
    # This way round the small operand is the one that is packed.
    torch.mm(_bf16(behaviors_nD), _bf16(candidates_CD).t(), out=keys_nC)
    return float(np.sqrt(lost_n.max()) * 1.001)


def _tile_products(
    table_VD: np.ndarray, past: Past, start: int, stop: int, candidates: int, scratch: _Scratch
) -> float:
    keys_nC, lost_n = _keys(scratch, stop - start, candidates), np.empty(stop - start, dtype=np.float32)
    behaviors_nD, products_SS = scratch.behaviors_nD, scratch.products_SS
    tiles_on(scratch.shapes)
    for low in range(start, stop, SIDE):
        high, row = min(low + SIDE, stop), low - start
        _unit_rows(table_VD, past.rows_n, low, high, past.inverse_n, behaviors_nD, lost_n[row:])
        for at in range(0, keys_nC.shape[1], SIDE):
            multiply_32(behaviors_nD, 0, scratch.pairs_PC, at, products_SS, 0, 0)
            for i in range(SIDE):
                round_32(products_SS, i, keys_nC, row + i, at)
    tiles_off()
    return np.sqrt(lost_n.max()) * 1.001


@overload(_products, strict=False)
def _compiled_products(table_VD: Any, past: Any, start: Any, stop: Any, candidates: Any, scratch: Any) -> Any:
    return _tile_products


@kernel(inlined=True)
def _keys(scratch: _Scratch, behaviors: int, candidates: int) -> np.ndarray:
    """Where the products (n, C) of a chunk lie: bf16 seen as int16, whole tiles."""
    n, c = _whole(behaviors, SIDE), _whole(candidates, WIDE)
    return scratch.keys[: n * c].reshape(n, c)


@kernel
def _open(table_VD: np.ndarray, groups: Groups, group: int, first: int, last: int, scratch: _Scratch) -> Any:
    """The history as yet unread, empty shortlists, unit candidates and what rounding took from each."""
    rows_n = groups.history_rows_N[groups.history_offsets[group] : groups.history_offsets[group + 1]]
    past = Past(rows_n, np.empty(len(rows_n)), np.zeros(len(rows_n) + 1, dtype=np.int64))
    rows_C, size = groups.candidate_rows_M[first:last], last - first
    scratch.candidates_CD[size:] = 0
    lost_C = np.empty(size, dtype=np.float32)
    _unit_rows(table_VD, rows_C, 0, size, np.empty(size), scratch.candidates_CD, lost_C)
    pairs_CP = scratch.candidates_CD.view(np.int32)
    for p in range(pairs_CP.shape[1]):
        for c in range(pairs_CP.shape[0]):
            scratch.pairs_PC[p, c] = pairs_CP[c, p]
    lists = Shortlists(
        np.full(size, LOWEST),
        np.zeros(size, dtype=np.float32),
        np.zeros(size, dtype=np.int64),
        scratch.ids_CB[:size],
        scratch.kept_CB[:size],
    )
    return past, lists, np.sqrt(lost_C) * np.float32(1.001)


_search_long_tiles = kernel(_search_long)


@kernel(inlined=True)
def _whole(size: int, side: int) -> int:
    return -(-size // side) * side


def _bf16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)


@kernel
def _empty_rows(found: TopK, blocks: _Blocks) -> None:
    for t in range(len(blocks.group_T)):
        for m in range(blocks.first_T[t], blocks.last_T[t]):
            found.positions_MK[m] = -1
            found.sims_MK[m] = PAD_SIM
            found.n_valid_M[m] = 0
            found.recent_MS[m] = PAD_SIM


@kernel
def _search_few(table_VD: np.ndarray, groups: Groups, found: TopK, blocks: _Blocks) -> None:
    for t in range(len(blocks.group_T)):
        past = past_of(table_VD, groups, blocks.group_T[t])
        first, last = blocks.first_T[t], blocks.last_T[t]
        nothing = Shortlists(
            np.empty(last - first, dtype=np.int16),
            np.empty(last - first, dtype=np.float32),
            np.full(last - first, -1, dtype=np.int64),
            np.empty((0, 0), dtype=np.int32),
            np.empty((0, 0), dtype=np.int16),
        )
        finish_block(table_VD, past, groups, first, last, nothing, found)


@kernel
def _count_tiers(sims_MK: np.ndarray, counts_MN: np.ndarray) -> None:
    for m in range(sims_MK.shape[0]):
        for i in range(sims_MK.shape[1]):
            tier = int(np.ceil(sims_MK[m, i] * np.float32(10.0))) + 10
            if 0 <= tier < counts_MN.shape[1]:
                counts_MN[m, tier] += 1


@kernel(inlined=True)
def _unit_rows(
    table_VD: np.ndarray,
    rows_n: np.ndarray,
    start: int,
    stop: int,
    inverse_n: np.ndarray,
    out_nD: np.ndarray,
    lost_n: np.ndarray,
) -> None:
    """Unit rows `start` .. `stop` as bf16 bits, zeros where there is no vector; the squared length each lost.

    Writes the exact inverse norms as well, so that a row is met once.
    """
    # Two loops: a row's norm and its rounding hang on each other, rows do not.
    for i in range(start, stop):
        ahead = rows_n[min(i + AHEAD, len(rows_n) - 1)]
        if ahead >= 0:
            fetch_row(table_VD, ahead)
        inverse_n[i] = inverse_norm(table_VD, rows_n[i])
    for i in range(start, stop):
        if 1e-30 < inverse_n[i] < 1e30:
            scale = np.float32(inverse_n[i])
            lost_n[i - start] = unit_bf16_row(table_VD, rows_n[i], scale, out_nD, i - start)
        else:
            out_nD[i - start] = 0
            # A length that float32 cannot scale loses all of itself: lists overflow, rows are scored exactly.
            lost_n[i - start] = inverse_n[i] > 0.0
