"""Exact cosine top-K on a GPU: products stay on the chip, winners are settled as on every other back end."""
# G groups, N behaviours of all groups, M candidates of all groups, V vectors, D dims, K kept, S recent

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prerank_tools.cuda_code import is_hopper
from prerank_tools.errors import UsageError
from prerank_tools.gsu.batch_cuda import Asked, Past, batches, kernel, layout, padded, rounding, upload
from prerank_tools.gsu.search import RECENT, Groups, TopK, empty_topk
from prerank_tools.gsu.simtier import TIERS

MAX_K = 96
MAX_WIDTH = 512
SCRATCH_BYTES = 256 << 20  # of exact cosines held at once for rows that no list settles


@dataclass(frozen=True)
class Plan:
    """How a search goes about it; any plan gives the same positions, counts and tiers."""

    last_bit: bool = True  # lists hold cosines rounded from float64; else within 1e-6 where that is cheaper
    hopper: bool | None = None  # Hopper's own products and copies; None where the card has them

    def on_hopper(self, device: torch.device) -> bool:
        """Whether to use what only Hopper has."""
        return is_hopper(device) if self.hopper is None else self.hopper


class Lists(NamedTuple):
    """What `shortlist` wrote: scores and positions in four parts a candidate, how many, and their floor."""

    entries_M4S2: Tensor
    counts_M4: Tensor
    floors_M: Tensor
    waiting: Tensor  # how many rows a list does not settle, and which


class Found(NamedTuple):
    """Tensors on the device, as in `TopK`."""

    positions_MK: Tensor
    sims_MK: Tensor
    n_valid_M: Tensor
    tier_MN: Tensor


def topk_cuda(
    table_VD: np.ndarray,
    groups: Groups,
    *,
    k: int = 50,
    recent: int = RECENT,
    plan: Plan | None = None,
    device: str = "cuda",
) -> TopK:
    """`search.topk` on a GPU; memory is bounded by the batch, whatever the number of groups."""
    if k > MAX_K or table_VD.shape[1] > MAX_WIDTH:
        raise UsageError(
            f"a GPU search takes K to {MAX_K} and widths to {MAX_WIDTH}, not {k} and {table_VD.shape[1]}",
            "use --device cpu",
        )
    found = empty_topk(len(groups.candidate_rows_M), k=k, recent=recent)
    table = torch.from_numpy(padded(table_VD)).to(device)
    plan = plan or Plan()
    for span in batches(groups, table.shape[1]):
        past, asked, members = upload(table, groups, span)
        result = search(past, asked, k=k, plan=plan)
        found.positions_MK[members] = result.positions_MK.cpu().numpy()
        found.sims_MK[members] = result.sims_MK.cpu().numpy()
        found.n_valid_M[members] = result.n_valid_M.cpu().numpy()
        found.recent_MS[members] = latest_cosines(past, asked, recent).cpu().numpy()
    return found


def search(past: Past, asked: Asked, *, k: int, plan: Plan, lists: bool = True, tiers: bool = False) -> Found:
    """The K best of each candidate of a batch, as lists or as SimTier counts or both."""
    listed = shortlist(past, asked, k=k, plan=plan)
    found = rank(past, asked, listed, k=k, plan=plan, lists=lists, tiers=tiers)
    settle(past, asked, listed, found, k=k)
    return found


def shortlist(past: Past, asked: Asked, *, k: int, plan: Plan) -> Lists:
    """Every behaviour that can be among the K best of a candidate, and some more, with float16 cosines."""
    rows, width, device = len(asked.group_M), past.rows.half_ND.shape[1], past.offsets.device
    slots, listed = room(k)
    lists = Lists(
        torch.empty((rows, 4, slots, 2), dtype=torch.int32, device=device),
        torch.empty((rows, 4), dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(1 + rows, dtype=torch.int32, device=device),
    )
    groups, shape, shared = layout(width)
    half_ND = past.rows.half_ND
    shape |= {"HOPPER": int(plan.on_hopper(device)), "SLOTS": slots, "LISTED": listed}
    kernel("shortlist.cu", "shortlist", half_ND, shared=shared, **shape).launch(
        len(asked.tile_group), 128 * groups + 128,
        past.tiles, half_ND, past.rows.scale_N,
        asked.rows.half_ND, asked.rows.scale_N, past.offsets, asked.visible_M, asked.slack_M,
        asked.tile_group, asked.tile_first, asked.tile_last, *lists, k,
    )  # fmt: skip
    return lists


def room(k: int) -> tuple[int, int]:
    """Behaviours that each of a list's four parts holds, and a list: well over what they come to."""
    return (48, 128) if k <= 64 else (64, 256)


def rank(
    past: Past, asked: Asked, listed: Lists, *, k: int, plan: Plan, lists: bool = True, tiers: bool = False
) -> Found:
    """The listed in order: by their scores, and by exact cosines where those leave a doubt."""
    rows, device = len(asked.group_M), past.offsets.device
    slots, most = room(k)
    found = Found(
        positions_MK=torch.empty((rows if lists else 0, k), dtype=torch.int32, device=device),
        sims_MK=torch.empty((rows if lists else 0, k), dtype=torch.float32, device=device),
        n_valid_M=torch.empty(rows, dtype=torch.int32, device=device),
        tier_MN=torch.empty((rows if tiers else 0, TIERS), dtype=torch.uint8, device=device),
    )
    shape = {"SLOTS": slots, "LISTED": most, "LISTS": int(lists), "TIERS": int(tiers)}
    kernel("rank.cu", "rank", past.rows.raw_ND, shared=4 * (most * 27 + 128), **shape).launch(
        -(-rows // 4), 128,
        asked.rows.raw_ND, past.rows.raw_ND, asked.rows.inverse_N, past.rows.inverse_N,
        asked.rows.scale_N, asked.slack_M, asked.group_M, asked.visible_M,
        past.with_vector_N, past.offsets, *listed, *found,
        rows, k, int(plan.last_bit), rounding(past.rows.raw_ND.shape[1]),
    )  # fmt: skip
    return found


def settle(past: Past, asked: Asked, listed: Lists, found: Found, *, k: int) -> None:
    """The definition itself for the rows that `rank` left waiting."""
    blocks = min(264, len(asked.group_M), SCRATCH_BYTES // (8 * max(asked.longest, 1)) + 1)
    scratch = torch.empty((blocks, asked.longest), dtype=torch.int64, device=past.offsets.device)
    shape = {"LISTS": int(len(found.positions_MK) > 0), "TIERS": int(len(found.tier_MN) > 0)}
    kernel("settle.cu", "settle", past.rows.raw_ND, **shape).launch(
        blocks, 256,
        asked.rows.raw_ND, past.rows.raw_ND, asked.rows.inverse_N, past.rows.inverse_N,
        asked.group_M, asked.visible_M, past.with_vector_N, past.offsets, listed.waiting, scratch,
        asked.longest, *found, k,
    )  # fmt: skip


def latest_cosines(past: Past, asked: Asked, recent: int) -> Tensor:
    """Exact cosines with the latest behaviours, newest first, padded as in `TopK`; (M, recent) float32."""
    rows = len(asked.group_M)
    sims = torch.empty((rows, recent), dtype=torch.float32, device=past.offsets.device)
    kernel("rows.cu", "latest", past.rows.raw_ND).launch(
        -(-rows * recent // 16), 256,
        asked.rows.raw_ND, past.rows.raw_ND, asked.rows.inverse_N, past.rows.inverse_N,
        asked.group_M, past.offsets, asked.visible_M, sims, rows, recent,
    )  # fmt: skip
    return sims
