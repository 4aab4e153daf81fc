"""Assignment on a Hopper card: all levels in one kernel of its own, then near ties in another."""
# N items (n in a block), D dims, L levels, K codes of a level, U units of 128 codes, C chunks of 64 dims

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from prerank_tools import cuda_code
from prerank_tools.quantizers.assign import COARSE_TIE
from prerank_tools.quantizers.assign_levels import MISSING, Guessed, Levels, has_triton
from prerank_tools.quantizers.assign_settle import measure_all, settle

MOST_DIMS = 512  # vectors of a block that fit in shared memory
MOST_CODES = 1 << 15  # a slot holds codes of 16 bits and a word for none
MOST_LEVELS = 4  # rows of bias that fit in registers
ROWS, UNIT, CHUNK = 128, 128, 64  # vectors of a block, codes of a unit, dims of a chunk
SHARED = 227 * 1024
FEW = 4_096  # open rows of which all levels are sooner measured than chosen
HOPPER = Path(__file__).parent / "hopper"
NEAREST = tuple(
    HOPPER / name for name in ("machine.cuh", "task.cuh", "search.cuh", "level.cuh", "nearest.cu")
)
SETTLE = tuple(HOPPER / name for name in ("machine.cuh", "settle.cu"))


def _structure(name: str, pointers: str, *more: tuple[str, type]) -> type[ctypes.Structure]:
    fields = [*((of, ctypes.c_void_p) for of in pointers.split()), *more]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_INT, _FLOAT = ctypes.c_int, ctypes.c_float
_Level = _structure("Level", "", *((of, _FLOAT) for of in ("a", "b", "c", "floor")), ("codes", _INT))
_Reach = _structure("Reach", "", ("error", _FLOAT), ("floor", _FLOAT), ("codes", _INT))


def _task(levels: int) -> type[ctypes.Structure]:
    numbers = ((of, _INT) for of in ("n", "first", "stride", "last", "slots_most"))
    pointers = "codes bias lost found runner slots doubt list counts"
    return _structure("Task", pointers, *numbers, ("level", _Level * levels))


def _doubts(levels: int) -> type[ctypes.Structure]:
    pointers = "x plain list listed found runner slots half norm doubt open opened"
    more = (("codes", _INT), ("scale", _FLOAT), ("close", ctypes.c_double), ("level", _Reach * levels))
    return _structure("Doubts", pointers, *more)


@dataclass(frozen=True)
class Packed:
    """The codebooks as the kernel streams them."""

    codes_LX: torch.Tensor  # float16 (L, U * C * 128 * 64), each chunk of a unit as it lies in shared memory
    bias: torch.Tensor  # float32: see nearest.cu; (L, K) norms where levels are wide
    size: int  # K, a multiple of 256


def fits(x_nD: torch.Tensor, levels: Levels) -> bool:
    """Whether the kernels can run: a Hopper card, vectors that fit on chip, a way to compile."""
    count, size, dims = levels.shape
    small = dims <= MOST_DIMS and dims % 8 == 0 and size <= MOST_CODES
    return (
        x_nD.is_cuda
        and cuda_code.is_hopper(x_nD.device)
        and small
        and (count <= MOST_LEVELS or levels.wide)
        and has_triton(levels)
        and cuda_code.available()
    )


def pack(levels: Levels) -> Packed:
    """Lay codes out by unit and chunk, swizzled; and the bias of scores, columns as threads hold them."""
    count, size, dims = levels.shape
    more = -size % (2 * UNIT)
    half_LKD = torch.nn.functional.pad(levels.half_LKD, (0, -dims % CHUNK, 0, more))
    norm_LK = torch.nn.functional.pad(levels.norm_LK, (0, more), value=MISSING)
    size += more
    parts = half_LKD.view(count, size // UNIT, UNIT, -1, 8, 8).transpose(2, 3)  # L, U, C, code, piece, 8 dims
    eight = torch.arange(8, device=parts.device)
    swizzle = (eight[:, None] ^ eight).repeat(UNIT // 8, 1)[None, None, None, :, :, None]
    codes_LX = torch.take_along_dim(parts, swizzle, dim=4).reshape(count, -1).contiguous()
    bias = [norm_LK] if levels.wide else [norm_LK[0], *_biases(levels, norm_LK, more)]
    columns = [b.reshape(-1, UNIT // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1) for b in bias]
    return Packed(codes_LX, torch.cat(columns).contiguous(), size)


def _biases(levels: Levels, norm_LK: torch.Tensor, more: int) -> Iterator[torch.Tensor]:
    """2 c_j.c for each level and each earlier one, |c|^2 added to the first; padded by `more` codes."""
    for level in range(1, levels.shape[0]):
        for earlier in range(level):
            table_KK = torch.nn.functional.pad(levels.table_LLKK[level, earlier], (0, more, 0, more))
            yield table_KK + norm_LK[level] if earlier == 0 else table_KK


@dataclass(frozen=True)
class Found:
    """What the first kernel leaves to settle: see nearest.cu."""

    guessed: Guessed
    slots: torch.Tensor  # uint16 (most, 8)
    list_n: torch.Tensor  # rows in doubt, in any order
    counts_4: torch.Tensor  # how many those are, slots taken, rows that either launch of settling leaves open


def assign_hopper(x_nD: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Codes (n, L) int32, exact."""
    x_nD = _as_read(x_nD)
    with torch.cuda.device(x_nD.device):
        found = guess_hopper(x_nD, levels)
        settle_hopper(x_nD, found, levels)
    return found.guessed.codes_nL


def _as_read(x_nD: torch.Tensor) -> torch.Tensor:
    """In a type that the kernels read, nothing lost, at an address that they can read 16 bytes from."""
    if x_nD.dtype == torch.int8:
        x_nD = x_nD.half()
    elif x_nD.dtype not in (torch.float16, torch.float32):
        x_nD = x_nD.float()
    x_nD = x_nD.contiguous()
    return x_nD.clone() if x_nD.data_ptr() % 16 else x_nD


def guess_hopper(x_nD: torch.Tensor, levels: Levels) -> Found:
    """Every level's codes by float16 products, with what may be nearer."""
    n, (count, _, _) = len(x_nD), levels.shape

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=x_nD.device)

    guessed = Guessed(integers(n, count), integers(n, count), integers(n))
    slots = integers(max(1_024, n * count // 8), 4)
    found = Found(guessed, slots, integers(n), torch.zeros(4, dtype=torch.int32, device=x_nD.device))
    for first in range(count if levels.wide else 1) if n else ():
        _launch(x_nD, levels, found, first)
    return found


def _launch(x_nD: torch.Tensor, levels: Levels, found: Found, first: int) -> None:
    """All levels in one launch or, where they are wide, level `first` alone."""
    (count, _, dims), packed, of = levels.shape, levels.packed, found.guessed
    half_nD, lost_n = _operand(x_nD, levels, of, first)
    here = range(first, first + 1) if levels.wide else range(count)
    bias = packed.bias[first * packed.size :] if levels.wide else packed.bias
    places = (packed.codes_LX[first], bias, lost_n, of.codes_nL, of.runner_nL, found.slots, of.doubt_n)
    task = _task(len(here))(
        *map(_address, (*places, found.list_n, found.counts_4)),
        len(x_nD), first, count, int(here[-1] == count - 1), len(found.slots),
        tuple((*bounds(level, levels), len(levels.exact[level])) for level in here),
    )  # fmt: skip
    defines = {"DIMS": dims + -dims % CHUNK, "CODES": packed.size, "LEVELS": len(here)}
    kernel = cuda_code.kernel(NEAREST, "nearest", SHARED, **defines)
    blocks = min(-(-len(x_nD) // ROWS), _processors(x_nD))
    kernel.launch(blocks, 384, cuda_code.tensor_map(half_nD, ROWS, CHUNK), task)


def _operand(
    x_nD: torch.Tensor, levels: Levels, guessed: Guessed, first: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The float16 vectors that a launch multiplies, and a bound on what that took from them, if anything."""
    if x_nD.dtype == torch.float16 and levels.scale == 1.0 and first == 0:
        return x_nD, None
    from prerank_tools.quantizers.assign_triton import residual_triton

    rows = residual_triton(x_nD, guessed, levels, first)
    return rows.half_nD, rows.lost_n


def _address(of: torch.Tensor | None) -> int | None:
    return None if of is None else of.data_ptr()


def bounds(level: int, levels: Levels) -> tuple[float, float, float, float]:
    """(a, b, c, floor): a score errs by at most a |r| + b |x| + c |lost| + floor; as `bounds`, for this card.

    Hopper adds 16 exact products and the sum so far at a time, aligned to the largest and cut (the models of
    Khattak and Mikaitis, arXiv 2512.07004). No bit beyond float32's last one is relied on: 18 errors of 2^-23
    for each 16 dims. Norms and tables are added in float32.
    """
    largest = levels.largest[level]
    sums = (levels.shape[2] * 18 / 16 + 64) * 2.0**-23
    floor = 1e-12 + 2.0**-21 * largest * (largest + 2.0 * sum(levels.largest[:level]))
    return 2.02 * levels.rounding[level], 2.02 * sums * largest, 2.02 * largest, floor


def _processors(x_nD: torch.Tensor) -> int:
    return torch.cuda.get_device_properties(x_nD.device).multi_processor_count


def settle_hopper(x_nD: torch.Tensor, found: Found, levels: Levels) -> int:
    """Correct the codes in place, the kernel's open rows by `settle`; returns how many needed the CPU."""
    counts, of = found.counts_4, found.guessed
    open_2n = torch.empty(2, len(x_nD), dtype=torch.int32, device=x_nD.device)
    listed, opened = (found.list_n, counts[0]), (open_2n[0], counts[2])
    _settle(x_nD, levels, found, (*listed, *opened), all_codes=False)
    if not levels.wide:  # else all codes are cheaper to measure by a matrix product
        listed, opened = opened, (open_2n[1], counts[3])
        _settle(x_nD, levels, found, (*listed, *opened), all_codes=True)
    rows_r = opened[0][: int(opened[1])].long()
    if not len(rows_r):
        return 0
    if len(rows_r) <= FEW:
        of.codes_nL[rows_r], left = measure_all(x_nD[rows_r], levels)
        return left
    part = Guessed(of.codes_nL[rows_r], of.runner_nL[rows_r], of.doubt_n[rows_r])
    left = settle(x_nD[rows_r], part, levels)
    of.codes_nL[rows_r] = part.codes_nL
    return left


def _settle(
    x_nD: torch.Tensor, levels: Levels, found: Found, lists: tuple[torch.Tensor, ...], *, all_codes: bool
) -> None:
    """One launch: `lists` are rows to settle and their number, rows left open and theirs."""
    (count, size, dims), of = levels.shape, found.guessed
    places = (x_nD, levels.plain_LKD, *lists[:2], of.codes_nL, of.runner_nL, found.slots)
    task = _doubts(count)(
        *map(_address, (*places, levels.half_LKD, levels.norm_LK, of.doubt_n, *lists[2:])),
        size, levels.scale, COARSE_TIE,
        tuple((*_reach(level, levels), len(levels.exact[level])) for level in range(count)),
    )  # fmt: skip
    defines = {"DIMS": dims, "LEVELS": count, "X_HALF": int(x_nD.dtype == torch.float16)}
    kernel = cuda_code.kernel(SETTLE, "settle", SEARCH_ALL=int(all_codes), **defines)
    kernel.launch(5 * _processors(x_nD), 128, task)  # blocks that are on chip at once


def _reach(level: int, levels: Levels) -> tuple[float, float]:
    """(error for each unit of |r|, floor) of a score by rounded codes and sums in float32 of any order."""
    sums = 2.0 * levels.largest[level] * (levels.shape[2] + 8) * 2.0**-24
    return 2.02 * levels.rounding[level] + 1.02 * sums, 1e-12 + 2.0**-21 * levels.largest[level] ** 2
