"""GSU on one GPU: checked against float64, then timed beside bmm + topk and the bare product.

    python benchmarks/gpu_gsu.py --out "$OUT"

Synthetic unit-Gaussian float16 vectors, in memory. A pair is one candidate against its user's whole history.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu_gsu_checks import PLANS, K, check, verify
from prerank_tools.gsu import search_cuda as gsu
from prerank_tools.gsu.batch_cuda import asked_of, past_of, prepared

KINDS = {"lists": {}, "histograms": {"lists": False, "tiers": True}}


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
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    lines = [
        "# GSU on one GPU",
        "",
        f"`python benchmarks/gpu_gsu.py` on {torch.cuda.get_device_name()}, {versions}, seed 0,",
        f"{datetime.now(UTC):%Y-%m-%d}. A pair is one candidate against its user's whole history; exact",
        "means equal to the float64 definition in positions, counts and tiers. Histories, candidates and",
        "their float16 rows lie in GPU memory; making those is timed apart (once a user). Medians of 20.",
        "",
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    lines += check()
    print("\n".join(lines), flush=True)
    shape = given.users, given.candidates, given.history, given.dims
    for section in (
        partial(time_shape, *shape),
        partial(time_others, *shape),
        partial(time_long, given.dims),
    ):
        lines += section()
        (given.out / "gsu_cuda.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def batch(
    users: int,
    candidates: int,
    history: int,
    dims: int,
    *,
    dtype: torch.dtype = torch.float16,
    again: int = 0,
) -> tuple[gsu.Past, gsu.Asked]:
    """Random users; every vector its own row, but that the first behaviour comes `again` times."""
    rows = users * (history + candidates)
    table = torch.randn(rows + 1, dims, device="cuda").to(dtype)
    table[-1] = 0
    past_rows = np.arange(users * history).reshape(users, history)
    past_rows[:, : again + 1] = past_rows[:, :1]
    past = past_of(table, past_rows.ravel(), np.arange(users + 1) * history)
    asked = asked_of(
        table, np.arange(users * history, rows), np.arange(users + 1) * candidates,
        np.full(users * candidates, history), past,
    )  # fmt: skip
    return past, asked


def time_shape(users: int, candidates: int, history: int, dims: int) -> list[str]:
    """Every plan of the search, beside the baselines."""
    pairs = users * candidates
    past, asked = batch(users, candidates, history, dims)
    unit, wanted = (
        past.rows.half_ND.view(users, history, dims),
        asked.rows.half_ND.view(users, candidates, dims),
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
    for name, plan in PLANS.items():
        verify(past, asked, plan)
        told(f"{name}: shortlist", graph(partial(gsu.shortlist, past, asked, k=K, plan=plan)).replay)
        listed = gsu.shortlist(past, asked, k=K, plan=plan)
        for kind, wanted in KINDS.items():
            work = partial(gsu.rank, past, asked, listed, k=K, plan=plan, **wanted)
            told(f"{name}: rank, {kind}", graph(work).replay)
        for kind, wanted in KINDS.items():
            work = partial(gsu.search, past, asked, k=K, plan=plan, **wanted)
            told(f"**{name}: exact {kind}**", work)
            told(f"**{name}: exact {kind}, as a CUDA graph**", graph(work).replay)
    told("rows of histories made ready (once a user)", lambda: prepared(past.rows.raw_ND))
    counts = listed.counts_M4.sum(1)
    lines += [
        "",
        f"Listed a row: mean {counts.float().mean():.1f}, most {int(counts.max())}, in one of its four parts "
        f"{int(listed.counts_M4.max())} of {gsu.room(K)[0]}; "
        f"left to the definition: {int(listed.waiting[0])} of {pairs}.",
        "",
    ]
    return lines


def time_others(users: int, candidates: int, history: int, dims: int) -> list[str]:
    """The same shape with other stored types and widths, and where lists overflow."""
    lines = ["## Other data, the same shape, as CUDA graphs", ""]
    lines += ["| what | lists, ms | M pairs/s | histograms, ms | M pairs/s | left to the definition |"]
    lines += ["|---|---|---|---|---|---|"]
    cases = {
        f"float32, d {dims}": {"dims": dims, "dtype": torch.float32},
        f"float16, d {dims}, one item seen 300 times": {"dims": dims, "again": 299},
        "float16, d 64": {"dims": 64},
        "float16, d 256": {"dims": 256},
        "float16, d 512": {"dims": 512},
    }
    for name, given in cases.items():
        past, asked = batch(users, candidates, history, **given)
        verify(past, asked, gsu.Plan(), rows=64)
        cells = []
        for wanted in KINDS.values():
            ms = median_ms(graph(partial(gsu.search, past, asked, k=K, plan=gsu.Plan(), **wanted)).replay)
            cells.append(f"{ms:.3f} | {users * candidates / ms / 1e3:.1f}")
        listed = gsu.shortlist(past, asked, k=K, plan=gsu.Plan())
        gsu.rank(past, asked, listed, k=K, plan=gsu.Plan())
        lines.append(f"| {name} | {' | '.join(cells)} | {int(listed.waiting[0])} |")
        print(lines[-1], flush=True)
    return [*lines, ""]


def time_long(dims: int) -> list[str]:
    """Longer and longer histories: pairs/s, time a pair and behaviour, memory."""
    lines = ["## Long histories, 512 candidates a user", ""]
    lines += ["| users x behaviours | ms | pairs/s | ns a pair and 1000 | peak GB | of it histories |"]
    lines += ["|---|---|---|---|---|---|"]
    for users, history in ((64, 4096), (64, 10_000), (64, 32_000), (64, 100_000), (32, 1_000_000)):
        torch.cuda.empty_cache()
        past, asked = batch(users, 512, history, dims)
        held = past.rows.raw_ND.nbytes + past.rows.half_ND.nbytes
        torch.cuda.reset_peak_memory_stats()
        ms = median_ms(partial(gsu.search, past, asked, k=K, plan=gsu.Plan()), repeats=5)
        pairs = users * 512
        peak = torch.cuda.max_memory_allocated()
        lines.append(
            f"| {users} x {history} | {ms:.2f} | {pairs / ms * 1e3:.3g} | "
            f"{ms * 1e6 / pairs / history * 1e3:.2f} | {peak / 1e9:.2f} | {held / 1e9:.2f} |"
        )
        verify(past, asked, gsu.Plan(), rows=8)
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
