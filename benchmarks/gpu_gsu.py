"""GSU on one GPU: checked against float64, then timed beside bmm + topk and the bare product.

    python benchmarks/gpu_gsu.py --out "$OUT"

Synthetic unit-Gaussian float16 vectors, in memory. A pair is one candidate against its user's whole history.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
import triton

from prerank_tools.gsu import search_cuda as gsu
from prerank_tools.gsu.search import Groups, topk_numpy
from prerank_tools.gsu.simtier import simtier

K = 50
# block_m x block_n x split, warps, stages
TILINGS = [
    (128, 64, 4, 8, 3),
    (128, 64, 4, 8, 4),
    (128, 64, 4, 8, 2),
    (256, 64, 4, 16, 2),
    (128, 128, 2, 8, 3),
]
RANKS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1)]  # rank warps; list rows, warps


def main() -> None:
    """Check, time, write."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--out", type=Path, default=Path())
    words.add_argument("--users", type=int, default=64)
    words.add_argument("--candidates", type=int, default=512)
    words.add_argument("--history", type=int, default=4096)
    words.add_argument("--dims", type=int, default=128)
    given = words.parse_args()
    torch.manual_seed(0)
    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"
    lines = [
        "# GSU on one GPU",
        "",
        f"`python benchmarks/gpu_gsu.py` on {torch.cuda.get_device_name()}, {versions}, seed 0,",
        f"{datetime.now(UTC):%Y-%m-%d}. A pair is one candidate against its user's whole history; exact",
        "means equal to the float64 definition in positions and tiers. Histories, candidates and their unit",
        "float16 rows lie in GPU memory; making those rows is timed apart (once a user). Medians of 20.",
        "",
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    lines += check()
    print("\n".join(lines), flush=True)
    best, timed = time_shape(given.users, given.candidates, given.history, given.dims)
    lines += timed
    for section in (list, partial(time_long, given.dims, best)):
        lines += section()
        (given.out / "gsu_cuda.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def batch(
    users: int, candidates: int, history: int, dims: int, tiling: gsu.Tiling
) -> tuple[gsu.Past, gsu.Asked]:
    """Random users; every vector its own row."""
    rows = users * (history + candidates)
    table = torch.randn(rows + 1, dims, device="cuda").half()
    table[-1] = 0
    past = gsu.past_of(table, np.arange(users * history), np.arange(users + 1) * history)
    asked = gsu.asked_of(
        table, np.arange(users * history, rows), np.arange(users + 1) * candidates,
        np.full(users * candidates, history), past, tiling,
    )  # fmt: skip
    return past, asked


def check() -> list[str]:
    """Small hard cases against the numpy definition, through the whole of `topk_cuda`."""
    rng = np.random.default_rng(0)
    cases = {}
    for dtype in (np.float32, np.float16, np.int8):
        table = (rng.normal(size=(900, 128)) * (40 if dtype is np.int8 else 1)).astype(dtype)
        table[:9] = 0
        cases[f"random {np.dtype(dtype).name}, ragged, missing"] = (table, ragged(rng, 900))
    close = (rng.normal(size=128) + rng.normal(size=(1200, 128)) * 1e-4).astype(np.float32)
    cases["near ties"] = (close, ragged(rng, 1200))
    cases["small integers, mostly ties and zeros"] = (
        (rng.integers(-1, 2, (60, 128)) * (np.arange(128) < 9)).astype(np.int8),
        ragged(rng, 60),
    )
    large = rng.normal(size=(900, 128))
    large[::3] *= 1e30
    cases["lengths float32 cannot square"] = (large.astype(np.float32), ragged(rng, 900))
    lines = ["| case | rows | positions | n_valid | tiers | worst cosine |", "|---|---|---|---|---|---|"]
    for name, (table, groups) in cases.items():
        found, expected = gsu.topk_cuda(table, groups, k=K), topk_numpy(table, groups, k=K)
        equal = [
            int((a != b).sum())
            for a, b in (
                (found.positions_MK, expected.positions_MK), (found.n_valid_M, expected.n_valid_M),
                (simtier(found.sims_MK), simtier(expected.sims_MK)),
            )
        ]  # fmt: skip
        worst = np.abs(found.sims_MK - expected.sims_MK).max()
        differ = " | ".join(f"{count} differ" for count in equal)
        lines.append(f"| {name} | {len(found.n_valid_M)} | {differ} | {worst:.1e} |")
        assert equal == [0, 0, 0] and worst < 1e-5, (name, equal, worst)
    return [*lines, ""]


def ragged(rng: np.random.Generator, rows: int) -> Groups:
    """A few users with histories of all lengths, candidates that see any prefix."""
    history, asked = rng.integers(0, 9000, 9), rng.integers(0, 40, 9)
    history[:3] = (1, 50, 200)
    visible = np.concatenate([rng.integers(0, n + 1, c) for n, c in zip(history, asked, strict=True)])
    return Groups(
        rng.integers(-1, rows, history.sum()), np.r_[0, history.cumsum()],
        rng.integers(-1, rows, asked.sum()), np.r_[0, asked.cumsum()], visible,
    )  # fmt: skip


def time_shape(users: int, candidates: int, history: int, dims: int) -> tuple[gsu.Tiling, list[str]]:
    """Every tiling of the search, beside the baselines."""
    pairs = users * candidates
    past, asked = batch(users, candidates, history, dims, gsu.Tiling())
    unit, wanted = (
        past.rows.unit_ND.view(users, history, dims),
        asked.rows.unit_ND.view(users, candidates, dims),
    )
    lines = [f"## {users} users x {candidates} candidates x {history} behaviours, d {dims}, K {K}", ""]
    lines += ["| what | ms | M pairs/s |", "|---|---|---|"]

    def told(name: str, work: Callable[[], object]) -> float:
        ms = median_ms(work)
        lines.append(f"| {name} | {ms:.3f} | {pairs / ms / 1e3:.1f} |")
        print(lines[-1], flush=True)
        return ms

    told("bare product, fp16 (bmm)", lambda: torch.bmm(wanted, unit.transpose(1, 2)))
    told("bmm + topk, fp16 (not exact)", lambda: torch.bmm(wanted, unit.transpose(1, 2)).topk(K, dim=-1))
    best, best_ms = gsu.Tiling(), float("inf")
    for block_m, block_n, split, warps, stages in TILINGS:
        narrow = 64 if split * block_n >= 256 else 128
        tiling = gsu.Tiling(block_m, block_n, split, warps, stages, narrow)
        name = f"{block_m}x{block_n}x{split} warps {warps} stages {stages}"
        try:
            past, asked = batch(users, candidates, history, dims, tiling)
            ms = told(f"mark, tiling {name}", partial(gsu.mark, past, asked, k=K, tiling=tiling))
            whole = told(
                f"exact top-K lists, tiling {name}", partial(gsu.search, past, asked, k=K, tiling=tiling)
            )
        except Exception as fault:
            lines.append(f"| tiling {name} | {type(fault).__name__} | - |")
            print(name, str(fault)[:300])
            continue
        print(f"   mark alone {ms:.3f} of {whole:.3f} ms")
        if whole < best_ms:
            best, best_ms = tiling, whole
    past, asked = batch(users, candidates, history, dims, best)
    for rank_warps, list_rows, list_warps in RANKS:
        tiling = replace(best, rank_warps=rank_warps, list_rows=list_rows, list_warps=list_warps)
        name = f"rank warps {rank_warps}, list rows {list_rows} warps {list_warps}"
        whole = told(f"exact top-K lists, {name}", partial(gsu.search, past, asked, k=K, tiling=tiling))
        if whole < best_ms:
            best, best_ms = tiling, whole
    verify(past, asked, best)
    words_, stride = gsu.mark(past, asked, k=K, tiling=best)
    place, count = gsu.list_marked(words_, stride, asked, best)
    told("best: list_marked", lambda: gsu.list_marked(words_, stride, asked, best))
    told(
        "best: rank, lists",
        lambda: gsu.rank(past, asked, place, count, k=K, tiling=best, lists=True, tiers=False),
    )
    told(
        "best: rank, tiers",
        lambda: gsu.rank(past, asked, place, count, k=K, tiling=best, lists=False, tiers=True),
    )
    told("**exact top-K, lists**", lambda: gsu.search(past, asked, k=K, tiling=best))
    told(
        "**exact SimTier histograms**",
        lambda: gsu.search(past, asked, k=K, tiling=best, lists=False, tiers=True),
    )
    told("both", lambda: gsu.search(past, asked, k=K, tiling=best, tiers=True))
    captured = graph(lambda: gsu.search(past, asked, k=K, tiling=best))
    told("**exact top-K, lists, as a CUDA graph**", captured.replay)
    captured_tiers = graph(lambda: gsu.search(past, asked, k=K, tiling=best, lists=False, tiers=True))
    told("**exact SimTier histograms, as a CUDA graph**", captured_tiers.replay)
    told("unit rows of histories (once a user)", lambda: gsu.prepared(past.rows.raw_ND))
    flags = gsu.search(past, asked, k=K, tiling=best).flag_M
    listed = f"Listed a row: mean {count.float().mean():.1f}, most {int(count.max())}; settled in float64:"
    lines += [
        "",
        f"Best: {best}. {listed} {int((flags > 0).sum())} of {pairs}.",
        "",
    ]
    return best, lines


def verify(past: gsu.Past, asked: gsu.Asked, tiling: gsu.Tiling, *, rows: int = 256) -> None:
    """A sample of the timed rows against float64 on the GPU."""
    found = gsu.search(past, asked, k=K, tiling=tiling, tiers=True)
    for row in torch.randint(0, len(asked.group_M), (rows,)).tolist():
        best, sims, n_valid = gsu._settle(past, asked, row, K)
        assert (found.positions_MK[row] == best).all(), row
        assert (found.sims_MK[row] - sims).abs().max() < 1e-5
        assert n_valid == found.n_valid_M[row]
        assert found.tier_MN[row].tolist() == simtier(sims.cpu().numpy()[None])[0].tolist()


def time_long(dims: int, tiling: gsu.Tiling) -> list[str]:
    """Longer and longer histories: pairs/s, time a pair and behaviour, memory."""
    lines = ["## Long histories, 512 candidates a user", ""]
    lines += ["| users x behaviours | ms | pairs/s | ns a pair and 1000 | peak GB | of it histories |"]
    lines += ["|---|---|---|---|---|---|"]
    for users, history in ((64, 4096), (64, 10_000), (64, 32_000), (64, 100_000), (32, 1_000_000)):
        torch.cuda.empty_cache()
        past, asked = batch(users, 512, history, dims, tiling)
        held = past.rows.raw_ND.nbytes + past.rows.unit_ND.nbytes
        torch.cuda.reset_peak_memory_stats()
        ms = median_ms(lambda: gsu.search(past, asked, k=K, tiling=tiling), repeats=5)  # noqa: B023
        pairs = users * 512
        peak = torch.cuda.max_memory_allocated()
        lines.append(
            f"| {users} x {history} | {ms:.2f} | {pairs / ms * 1e3:.3g} | "
            f"{ms * 1e6 / pairs / history * 1e3:.2f} | {peak / 1e9:.2f} | {held / 1e9:.2f} |"
        )
        verify(past, asked, tiling, rows=8)
    return [*lines, ""]


def median_ms(work: Callable[[], object], *, repeats: int = 20) -> float:
    """Median time on the device."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return float(np.median(times))


def graph(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The launches of a search recorded once: what a server that searches one shape all day does."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        work()
    return captured


if __name__ == "__main__":
    main()
