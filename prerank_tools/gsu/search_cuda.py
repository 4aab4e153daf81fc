"""Exact cosine top-K on a GPU: products stay on the chip, winners are settled as on every other back end."""
# G groups, N behaviours of all groups, M candidates of all groups, V vectors, D dims, K kept, S recent

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from prerank_tools.errors import UsageError
from prerank_tools.gsu import kernels_cuda as kernels
from prerank_tools.gsu.cosine import LANES
from prerank_tools.gsu.search import RECENT, Groups, TopK, empty_topk
from prerank_tools.gsu.simtier import TIERS

MAX_K = 96
MAX_WIDTH = 512
LISTED = 128  # positions listed a candidate; a row with more is settled by the reference
WORD_BYTES = 512 << 20  # of marks held at once: candidates are taken in batches
HISTORY_BYTES = 4 << 30  # of unit rows held at once: groups are taken in batches


@dataclass(frozen=True)
class Tiling:
    """Shapes of the product, for an H100 or H200 at up to 128 dims; any of them gives the same result."""

    block_m: int = 128
    block_n: int = 64
    split: int = 4  # groups of behaviours = split * block_n, well above K
    warps: int = 8
    stages: int = 3
    narrow: int = 64  # listed behaviours that the float32 pass takes
    rank_warps: int = 2
    list_rows: int = 1
    list_warps: int = 1

    @classmethod
    def for_width(cls, width: int) -> Tiling:
        """What fits in the 227 KB of a multiprocessor's shared memory."""
        if width <= 128:
            return cls()
        return cls(stages=2) if width <= 256 else cls(block_m=64, stages=1)


class Prepared(NamedTuple):
    """Stored rows of a ragged batch with their unit float16 form and exact inverse lengths."""

    raw_ND: Tensor
    unit_ND: Tensor
    inverse_N: Tensor


class Past(NamedTuple):
    """Histories of a batch: rows, running counts of rows with a vector."""

    rows: Prepared
    with_vector_N: Tensor
    offsets: Tensor


class Asked(NamedTuple):
    """Candidates of a batch: rows, group of each, how much it sees, how far products err, tiles."""

    rows: Prepared
    group_M: Tensor
    visible_M: Tensor
    slack_M: Tensor
    tile_group: Tensor
    tile_first: Tensor
    tile_last: Tensor
    longest: int


class Found(NamedTuple):
    """Tensors on the device, as in `TopK`; `flag_M` is 3 where a row is left to the reference."""

    positions_MK: Tensor
    sims_MK: Tensor
    n_valid_M: Tensor
    tier_MN: Tensor
    flag_M: Tensor


def topk_cuda(
    table_VD: np.ndarray,
    groups: Groups,
    *,
    k: int = 50,
    recent: int = RECENT,
    tiling: Tiling | None = None,
    device: str = "cuda",
) -> TopK:
    """`search.topk` on a GPU; memory is bounded by the batch, whatever the number of groups."""
    if k > MAX_K or table_VD.shape[1] > MAX_WIDTH:
        raise UsageError(
            f"a GPU search takes K to {MAX_K} and widths to {MAX_WIDTH}, not {k} and {table_VD.shape[1]}",
            "use --device cpu",
        )
    found = empty_topk(len(groups.candidate_rows_M), k=k, recent=recent)
    table = torch.from_numpy(_padded(table_VD)).to(device)
    tiling = tiling or Tiling.for_width(table.shape[1])
    for span in _batches(groups, table.shape[1]):
        past, asked, members = upload(table, groups, span, tiling)
        result = search(past, asked, k=k, tiling=tiling)
        found.positions_MK[members] = result.positions_MK.cpu().numpy()
        found.sims_MK[members] = result.sims_MK.cpu().numpy()
        found.n_valid_M[members] = result.n_valid_M.cpu().numpy()
        found.recent_MS[members] = latest_cosines(past, asked, recent).cpu().numpy()
        for row in torch.nonzero(result.flag_M == 3)[:, 0].tolist():
            best, sims, n_valid = _settle(past, asked, row, k)
            found.positions_MK[members][row, : len(best)] = best.cpu().numpy()
            found.sims_MK[members][row, : len(best)] = sims.cpu().numpy()
            found.n_valid_M[members.start + row] = n_valid
    return found


def upload(table: Tensor, groups: Groups, span: range, tiling: Tiling) -> tuple[Past, Asked, slice]:
    """One batch of groups on the device: gathered rows, offsets, tiles; and which candidates it holds."""
    first, last = groups.history_offsets[span.start], groups.history_offsets[span.stop]
    members = slice(int(groups.candidate_offsets[span.start]), int(groups.candidate_offsets[span.stop]))
    offsets = groups.history_offsets[span.start : span.stop + 1] - first
    candidate_offsets = groups.candidate_offsets[span.start : span.stop + 1] - members.start
    past = past_of(table, groups.history_rows_N[first:last], offsets)
    asked = asked_of(
        table, groups.candidate_rows_M[members], candidate_offsets, groups.visible_M[members], past, tiling
    )
    return past, asked, members


def past_of(table: Tensor, rows_N: np.ndarray, offsets: np.ndarray) -> Past:
    """Histories on the device. `table` is the stored rows with one row of zeros after them."""
    rows = prepared(table[_to(rows_N, table)])
    has_N = (rows.inverse_N > 0).to(torch.int32)
    running_N = has_N.cumsum(0, dtype=torch.int32)
    sizes, starts = _to(np.diff(offsets), table), _to(offsets, table)
    before_G = torch.cat([running_N.new_zeros(1), running_N])[starts[:-1]]
    before_N = torch.repeat_interleave(before_G, sizes, output_size=len(rows_N))
    return Past(rows, running_N - before_N, starts)


def asked_of(
    table: Tensor, rows_M: np.ndarray, offsets: np.ndarray, visible_M: np.ndarray, past: Past, tiling: Tiling
) -> Asked:
    """Candidates on the device, cut into tiles of one group each."""
    sizes = np.diff(offsets)
    tiles = -(-sizes // tiling.block_m)
    group_T = np.repeat(np.arange(len(sizes)), tiles)
    within_T = np.arange(len(group_T)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first_T = offsets[:-1][group_T] + within_T * tiling.block_m
    last_T = np.minimum(first_T + tiling.block_m, offsets[1:][group_T])
    rows = prepared(table[_to(rows_M, table)])
    group_M = _to(np.repeat(np.arange(len(sizes)), sizes), table).to(torch.int32)
    return Asked(
        rows=rows,
        group_M=group_M,
        # A candidate without a vector sees nothing, and is done.
        visible_M=torch.where(rows.inverse_N > 0, _to(visible_M, table), 0).to(torch.int32),
        slack_M=_slack(past, rows, group_M),
        tile_group=_to(group_T, table).to(torch.int32),
        tile_first=_to(first_T, table).to(torch.int32),
        tile_last=_to(last_T, table).to(torch.int32),
        longest=int(visible_M.max(initial=0)),
    )


def prepared(raw_ND: Tensor) -> Prepared:
    """Unit float16 rows and exact inverse lengths; 0 for a row that is zero or not finite."""
    unit_ND = torch.empty_like(raw_ND, dtype=torch.float16)
    square_N = torch.empty(len(raw_ND), dtype=torch.float64, device=raw_ND.device)
    if len(raw_ND):
        rows = 16
        kernels.prepare[(triton.cdiv(len(raw_ND), rows),)](
            raw_ND, unit_ND, square_N, len(raw_ND), D=raw_ND.shape[1], R=rows
        )
    usable_N = torch.isfinite(square_N) & (square_N > 0)
    return Prepared(raw_ND, unit_ND, torch.where(usable_N, 1.0 / torch.sqrt(square_N), 0.0))


def search(
    past: Past, asked: Asked, *, k: int, tiling: Tiling, lists: bool = True, tiers: bool = False
) -> Found:
    """The K best of each candidate of a batch, as lists or as SimTier counts or both."""
    words, stride = mark(past, asked, k=k, tiling=tiling)
    place_MP, count_M = list_marked(words, stride, asked, tiling)
    return rank(past, asked, place_MP, count_M, k=k, tiling=tiling, lists=lists, tiers=tiers)


def mark(past: Past, asked: Asked, *, k: int, tiling: Tiling) -> tuple[Tensor, int]:
    """One bit a behaviour for each candidate: can it be among the K best?"""
    width = past.rows.unit_ND.shape[1]
    stride = -(-asked.longest // (32 * tiling.block_n)) * tiling.block_n
    words = torch.empty((len(asked.group_M), stride), dtype=torch.int32, device=past.rows.unit_ND.device)
    if len(asked.tile_group) and stride:
        kernels.mark[(len(asked.tile_group),)](
            asked.rows.unit_ND,
            past.rows.unit_ND,
            past.offsets,
            asked.visible_M,
            asked.slack_M,
            asked.tile_group,
            asked.tile_first,
            asked.tile_last,
            words,
            stride,
            K=k,
            D=width,
            BM=tiling.block_m,
            BN=tiling.block_n,
            SPLIT=tiling.split,
            STAGES=tiling.stages,
            num_warps=tiling.warps,
        )
    return words, stride


def list_marked(words: Tensor, stride: int, asked: Asked, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Positions of the marked behaviours, (M, LISTED), and how many there are."""
    rows = len(asked.group_M)
    place_MP = torch.empty((rows, LISTED), dtype=torch.int32, device=words.device)
    count_M = torch.empty(rows, dtype=torch.int32, device=words.device)
    if rows:
        kernels.list_marked[(triton.cdiv(rows, tiling.list_rows),)](
            words,
            stride,
            asked.visible_M,
            rows,
            place_MP,
            count_M,
            P=LISTED,
            BN=tiling.block_n,
            R=tiling.list_rows,
            num_warps=tiling.list_warps,
        )
    return place_MP, count_M


def rank(
    past: Past,
    asked: Asked,
    place_MP: Tensor,
    count_M: Tensor,
    *,
    k: int,
    tiling: Tiling,
    lists: bool,
    tiers: bool,
) -> Found:
    """Settle the listed: in float32 where its error cannot matter, the rest in fixed-order float64."""
    rows, width, device = len(count_M), past.rows.raw_ND.shape[1], count_M.device
    found = Found(
        positions_MK=torch.empty((rows, k) if lists else (0, k), dtype=torch.int32, device=device),
        sims_MK=torch.empty((rows, k) if lists else (0, k), dtype=torch.float32, device=device),
        n_valid_M=torch.empty(rows, dtype=torch.int32, device=device),
        tier_MN=torch.empty((rows, TIERS) if tiers else (0, TIERS), dtype=torch.uint8, device=device),
        flag_M=torch.empty(rows, dtype=torch.int32, device=device),
    )
    # Sums of 8, of PART / 8 and of the parts, in any order, then lengths: each operation rounds once.
    part = min(32, width)
    error = (8 + part // 8 + width // part + 6) * 2.0**-24
    narrow = min(tiling.narrow, LISTED)
    tables = (
        asked.rows.raw_ND, past.rows.raw_ND, asked.rows.inverse_N, past.rows.inverse_N, past.with_vector_N,
        asked.group_M, past.offsets, asked.visible_M, place_MP, count_M, found.flag_M,
        found.positions_MK, found.sims_MK, found.n_valid_M, found.tier_MN,
    )  # fmt: skip
    shape = {
        "K": k,
        "KP": triton.next_power_of_2(k),
        "D": width,
        "STRIDE": LISTED,
        "LISTS": lists,
        "TIERS": tiers,
    }
    if rows:
        kernels.rank[(rows,)](*tables, error, P=narrow, PART=part, num_warps=tiling.rank_warps, **shape)
        few = (min(rows, 2048),)
        kernels.rank_exactly[few](*tables, rows, P=narrow, FLAG=1, num_warps=2, **shape)
        kernels.rank_exactly[few](*tables, rows, P=LISTED, FLAG=2, num_warps=4, **shape)
    return found


def latest_cosines(past: Past, asked: Asked, recent: int) -> Tensor:
    """Exact cosines with the latest behaviours, newest first, padded as in `TopK`; (M, recent) float32."""
    sims = torch.empty((len(asked.group_M), recent), dtype=torch.float32, device=past.offsets.device)
    if sims.numel():
        kernels.latest[(len(sims),)](
            asked.rows.raw_ND,
            past.rows.raw_ND,
            asked.rows.inverse_N,
            past.rows.inverse_N,
            asked.group_M,
            past.offsets,
            asked.visible_M,
            sims,
            S=recent,
            D=past.rows.raw_ND.shape[1],
            P=triton.next_power_of_2(recent),
        )
    return sims


def _slack(past: Past, rows: Prepared, group_M: Tensor) -> Tensor:
    """How far a product can be from its cosine: two rounded unit rows, and additions in float32."""
    width = rows.unit_ND.shape[1]
    loss = 2.0**-11 * 1.001 + width**0.5 * 2.0**-25
    slack = loss * (2 + loss) + width * 2.0**-23 + 1e-6
    # Rows whose length float32 cannot invert have no unit form: nothing their group is told can be trusted.
    running = torch.cat([past.offsets.new_zeros(1), _strange(past.rows).cumsum(0)])
    strange_G = running[past.offsets[1:]] > running[past.offsets[:-1]]
    return torch.where(strange_G[group_M.long()] | _strange(rows), 4.0, slack).to(torch.float32)


def _strange(rows: Prepared) -> Tensor:
    return ((rows.inverse_N > 1e17) | (rows.inverse_N < 1e-17)) & (rows.inverse_N > 0)


def _settle(past: Past, asked: Asked, row: int, k: int) -> tuple[Tensor, Tensor, int]:
    """A row with more near ties than a list holds: every cosine in float64; positions, cosines, `n_valid`."""
    start = int(past.offsets[asked.group_M[row]])
    seen = slice(start, start + int(asked.visible_M[row]))
    raw_nD, candidate_D = past.rows.raw_ND[seen].double(), asked.rows.raw_ND[row].double()
    sims_n = _lane_dots(raw_nD, candidate_D) * asked.rows.inverse_N[row] * past.rows.inverse_N[seen]
    chosen_n = torch.nonzero((past.rows.inverse_N[seen] > 0) & (sims_n != 0))[:, 0].flip(0)
    order = torch.sort(sims_n[chosen_n], descending=True, stable=True).indices[:k]
    best = chosen_n[order]
    n_valid = int(past.with_vector_N[seen.stop - 1]) if len(best) == k else len(best)
    return best, sims_n[best].to(torch.float32), n_valid


def _lane_dots(x_nD: Tensor, y_D: Tensor) -> Tensor:
    """`cosine.lane_dots` in torch."""
    x_nSL, y_SL = x_nD.view(len(x_nD), -1, LANES), y_D.view(-1, LANES)
    total = x_nSL[:, 0] * y_SL[0]
    for step in range(1, x_nSL.shape[1]):
        total = total + x_nSL[:, step] * y_SL[step]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def _batches(groups: Groups, width: int) -> Iterator[range]:
    """Runs of whole groups whose unit rows and marks fit."""
    start, rows, marks = 0, 0, 0
    history, asked = np.diff(groups.history_offsets), np.diff(groups.candidate_offsets)
    for group, length in enumerate(history):
        longest = max(int(history[start : group + 1].max()), int(length))
        rows, marks = rows + length, longest // 8 * int(asked[start : group + 1].sum())
        if group > start and (rows * width * 4 > HISTORY_BYTES or marks > WORD_BYTES):
            yield range(start, group)
            start, rows = group, length
    if len(history):
        yield range(start, len(history))


def _padded(table_VD: np.ndarray) -> np.ndarray:
    """Stored rows, their width a power of two from 16 up, and a row of zeros for what has no vector."""
    width = max(LANES, triton.next_power_of_2(table_VD.shape[1]))
    return np.pad(table_VD, ((0, 1), (0, width - table_VD.shape[1])))


def _to(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(like.device)
