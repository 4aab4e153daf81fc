"""Batches of a GPU search: histories and candidates on the device, ready for products, cut into tiles."""
# G groups, N behaviours of all groups, M candidates of all groups, V vectors, D dims, T tiles

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prerank_tools import cuda_code
from prerank_tools.gsu.search import Groups

LIST_BYTES = 1 << 30  # of lists held at once: candidates are taken in batches
HISTORY_BYTES = 4 << 30  # of half-precision rows held at once: groups are taken in batches
HERE = Path(__file__).parent
STORED = {torch.float32: 0, torch.float16: 1, torch.int8: 2}


class Prepared(NamedTuple):
    """Stored rows of a batch, in float16, exact inverse lengths, and how the two differ (`rows.cu`)."""

    raw_ND: Tensor
    half_ND: Tensor
    inverse_N: Tensor
    scale_N: Tensor
    loss_N: Tensor


class Past(NamedTuple):
    """Histories of a batch: rows, running counts of rows with a vector, how the copy engine finds tiles."""

    rows: Prepared
    with_vector_N: Tensor
    offsets: Tensor
    tiles: Any


class Asked(NamedTuple):
    """Candidates of a batch: rows, group of each, how much it sees, how far its scores err, tiles."""

    rows: Prepared
    group_M: Tensor
    visible_M: Tensor
    slack_M: Tensor
    tile_group: Tensor
    tile_first: Tensor
    tile_last: Tensor
    longest: int


def batches(groups: Groups, width: int) -> Iterator[range]:
    """Runs of whole groups whose rows and lists fit."""
    start, rows, lists = 0, 0, 0
    history, asked = np.diff(groups.history_offsets), np.diff(groups.candidate_offsets)
    for group, length in enumerate(history):
        rows, lists = rows + length, lists + 4096 * asked[group]
        if group > start and (rows * width * 4 > HISTORY_BYTES or lists > LIST_BYTES):
            yield range(start, group)
            start, rows, lists = group, length, 4096 * asked[group]
    if len(history):
        yield range(start, len(history))


def upload(table: Tensor, groups: Groups, span: range) -> tuple[Past, Asked, slice]:
    """One batch of groups on the device: gathered rows, offsets, tiles; and which candidates it holds."""
    first, last = groups.history_offsets[span.start], groups.history_offsets[span.stop]
    members = slice(int(groups.candidate_offsets[span.start]), int(groups.candidate_offsets[span.stop]))
    offsets = groups.history_offsets[span.start : span.stop + 1] - first
    candidate_offsets = groups.candidate_offsets[span.start : span.stop + 1] - members.start
    past = past_of(table, groups.history_rows_N[first:last], offsets)
    asked = asked_of(
        table, groups.candidate_rows_M[members], candidate_offsets, groups.visible_M[members], past
    )
    return past, asked, members


def past_of(table: Tensor, rows_N: np.ndarray, offsets: np.ndarray) -> Past:
    """Histories on the device. `table` is the stored rows with one row of zeros after them."""
    rows = prepared(table[_to(rows_N if len(rows_N) else np.array([-1]), table)])
    has_N = (rows.inverse_N > 0).to(torch.int32)
    running_N = has_N.cumsum(0, dtype=torch.int32)
    sizes, starts = _to(np.diff(offsets), table), _to(offsets, table)
    before_G = torch.cat([running_N.new_zeros(1), running_N])[starts[:-1]]
    before_N = torch.repeat_interleave(before_G, sizes, output_size=len(rows_N))
    _, shape, _ = layout(table.shape[1])
    hopper = cuda_code.is_hopper(table.device)
    tiles = cuda_code.tensor_map(rows.half_ND, shape["COLUMNS"], 64) if hopper else cuda_code.no_map()
    return Past(rows, running_N[: len(rows_N)] - before_N, starts, tiles)


def asked_of(
    table: Tensor, rows_M: np.ndarray, offsets: np.ndarray, visible_M: np.ndarray, past: Past
) -> Asked:
    """Candidates on the device, cut into tiles of one group each."""
    group_T, first_T, last_T = tiles(offsets, 64 * warpgroups(table.shape[1]))
    rows = prepared(table[_to(rows_M, table)])
    group_M = _to(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), table).to(torch.int32)
    return Asked(
        rows=rows,
        group_M=group_M,
        # A candidate without a vector sees nothing, and is done.
        visible_M=torch.where(rows.inverse_N > 0, _to(visible_M, table), 0).to(torch.int32),
        slack_M=_slack(past, rows),
        tile_group=_to(group_T, table).to(torch.int32),
        tile_first=_to(first_T, table).to(torch.int32),
        tile_last=_to(last_T, table).to(torch.int32),
        longest=int(visible_M.max(initial=0)),
    )


def tiles(offsets: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group, first and past-the-last candidate of each tile (T,): up to `height` candidates of one group."""
    sizes = np.diff(offsets)
    count_G = -(-sizes // height)
    group_T = np.repeat(np.arange(len(sizes)), count_G)
    within_T = np.arange(len(group_T)) - np.repeat(np.cumsum(count_G) - count_G, count_G)
    first_T = offsets[:-1][group_T] + within_T * height
    return group_T, first_T, np.minimum(first_T + height, offsets[1:][group_T])


def prepared(raw_ND: Tensor) -> Prepared:
    """Rows in float16, exact inverse lengths, what a float16 row lacks; zeros for a row without a vector."""
    rows, device = len(raw_ND), raw_ND.device
    made = Prepared(
        raw_ND,
        torch.empty_like(raw_ND, dtype=torch.float16),
        torch.empty(rows, dtype=torch.float64, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )
    kernel("rows.cu", "prepare", raw_ND).launch(-(-rows // 16), 256, *made, rows)
    return made


def padded(table_VD: np.ndarray) -> np.ndarray:
    """Stored rows, their width 64 or a multiple of 128, and a row of zeros for what has no vector."""
    width = 64 if table_VD.shape[1] <= 64 else -(-table_VD.shape[1] // 128) * 128
    return np.pad(table_VD, ((0, 1), (0, width - table_VD.shape[1])))


def warpgroups(width: int) -> int:
    """Groups of 64 candidates in a tile: what fits in the 227 KB of a multiprocessor's shared memory."""
    return 2 if width <= 256 else 1


def layout(width: int) -> tuple[int, dict[str, int], int]:
    """Groups of four warps, the kernel's constants and its shared memory, which must stay under 227 KB."""
    groups, held = warpgroups(width), width <= 128
    columns, stages = (128, 3) if held else (64, 2)
    staged = 10 if held else 8 if width <= 384 else 5
    tiles = stages * columns * (width * 2 + 4) + (0 if held else groups * 64 * width * 2)
    shared = 1024 + tiles + 3 * staged * groups * 128 * 16
    constants = {
        "HELD": int(held),
        "WARPGROUPS": groups,
        "COLUMNS": columns,
        "STAGES": stages,
        "STAGED": staged,
    }
    return groups, constants, shared


def rounding(width: int) -> float:
    """How far the tensor cores' float32 sum of a unit product can be from the product."""
    return width * 2.0**-23 + 1e-6


def kernel(file: str, name: str, raw_ND: Tensor, *, shared: int = 0, **defines: int) -> cuda_code.Kernel:
    """A kernel of one of our files for stored rows like these, on their card."""
    defines |= {"WIDTH": raw_ND.shape[1], "RAW": STORED[raw_ND.dtype]}
    headers = ("cosine.cuh", "product.cuh") if file == "shortlist.cu" else ("cosine.cuh",)
    sources = tuple(HERE / source for source in (*headers, file))
    with torch.cuda.device(raw_ND.device):
        return cuda_code.kernel(sources, name, shared, **defines)


def _slack(past: Past, rows: Prepared) -> Tensor:
    """How far a score can be from its cosine: two rounded rows, and additions in float32."""
    worst = past.rows.loss_N.max() if len(past.rows.loss_N) else rows.loss_N.new_zeros(())
    return rows.loss_N + worst * (1 + rows.loss_N) + rounding(rows.raw_ND.shape[1])


def _to(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(like.device)
