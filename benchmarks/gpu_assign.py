"""Residual assignment on one GPU: checked against float64 and the CPU, then timed beside eager bf16.

    python benchmarks/gpu_assign.py --out "$OUT"

Synthetic float16 unit vectors around clusters, in GPU memory; codebooks fitted on them by k-means.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import triton

from prerank_tools.quantizers import assign_torch as gpu
from prerank_tools.quantizers.assign import assign_exact
from prerank_tools.quantizers.assign_triton import Tiling, nearest_triton
from prerank_tools.quantizers.kmeans_torch import kmeans_torch

FAILED: list[str] = []
TILINGS = [
    Tiling(128, 128, 64, 8, 3),
    Tiling(128, 128, 64, 8, 4),
    Tiling(128, 256, 64, 16, 3),
    Tiling(256, 128, 64, 16, 3),
    Tiling(128, 256, 64, 8, 3),
    Tiling(128, 256, 64, 16, 4),
]


def main() -> None:
    """Check, time, write."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--out", type=Path, default=Path())
    words.add_argument("--dims", type=int, default=512)
    words.add_argument("--rows", type=int, default=1 << 22)
    given = words.parse_args()
    torch.manual_seed(0)
    lines = [
        "# Residual assignment on one GPU", "",
        f"`python benchmarks/gpu_assign.py` on {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, Python {platform.python_version()}, {datetime.now(UTC):%F}, seed 0.",
        "",
        f"{given.rows:,} float16 vectors of {given.dims} dims in GPU memory. \"Exact\" is the whole of "
        "`assign_on_device`: fused product and argmin, then rows in doubt in float64, then the rest on the "
        "CPU; its codes equal the float64 definition. \"Guess\" is the part before float64. \"Eager\" is the "
        "plain loop in bf16 (product, argmin, subtraction), which is not exact. Medians of 10.", "",
    ]  # fmt: skip
    for decay in (0.5, 0.0):
        x_ND = clustered(given.rows, given.dims, decay=decay)
        lines += [
            "",
            f"# Spectrum decaying as i^-{decay}" if decay else "# Flat spectrum: small gaps everywhere",
        ]
        for size, rows in ((256, given.rows), (8_192, given.rows // 8)):
            lines += measure(x_ND[:rows], size, brief=not decay)
    text = "\n".join(lines) + "\n"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu_assign.md").write_text(text)
    print(text)
    if FAILED:
        raise SystemExit("\n".join(FAILED))


def clustered(rows: int, dims: int, *, decay: float) -> torch.Tensor:
    """Unit vectors: 20,000 clusters of Zipf size; dimension i has a spread of i^-decay, as encoders have."""
    weight_D = torch.arange(1, dims + 1, device="cuda").float() ** -decay
    centre_CD = torch.nn.functional.normalize(torch.randn(20_000, dims, device="cuda") * weight_D)
    share_C = 1.0 / torch.arange(1, 20_001, device="cuda").float().sqrt()
    blocks = []
    for _ in range(0, rows, 1 << 18):
        which = torch.multinomial(share_C, 1 << 18, replacement=True)
        noise = torch.nn.functional.normalize(torch.randn(1 << 18, dims, device="cuda") * weight_D)
        blocks.append(torch.nn.functional.normalize(2.0 * centre_CD[which] + 1.2 * noise).half())
    return torch.cat(blocks)[:rows]


def measure(x_ND: torch.Tensor, size: int, *, brief: bool) -> list[str]:
    """One section: fit, check, time."""
    started = time.perf_counter()
    codebooks = fit(x_ND[: 1 << 19], size, iterations=25 if size <= 1_024 else 8)
    fitted = time.perf_counter() - started
    levels = gpu.put_levels(codebooks, "cuda")
    lines = [f"## 3 x {size}", "", f"Fitted on {min(len(x_ND), 1 << 19):,} rows in {fitted:.1f} s.", ""]
    lines += check(x_ND, codebooks, levels)
    lines += ["| path | M vectors/s | ms | TFLOP/s of the product |", "|---|---|---|---|"]
    flop = 2.0 * len(x_ND) * x_ND.shape[1] * 3 * size

    def row(name: str, work: Callable[[], object]) -> float:
        try:
            ms = median_ms(work)
        except Exception as fault:  # a tiling that does not fit this GPU is a line in the table
            lines.append(f"| {name} | {type(fault).__name__}: {str(fault).splitlines()[0][:80]} | | |")
            return float("inf")
        lines.append(f"| {name} | {len(x_ND) / ms / 1e3:.1f} | {ms:.3f} | {flop / ms / 1e9:.0f} |")
        return ms

    narrow_ND = x_ND.bfloat16()
    narrow = [torch.from_numpy(codebook_KD).cuda().bfloat16() for codebook_KD in codebooks]
    row("eager bf16", lambda: eager(narrow_ND, narrow))
    row("product alone, bf16", lambda: product_alone(narrow_ND, narrow))
    best, best_ms = Tiling(), float("inf")
    for tiling in TILINGS[:1] if brief else TILINGS:
        nearest = partial(nearest_triton, tiling=tiling)
        ms = row(f"guess, kernel {tiling}", lambda nearest=nearest: gpu.guess(x_ND, levels, nearest))
        if ms < best_ms:
            best, best_ms = tiling, ms
    nearest = partial(nearest_triton, tiling=best)
    row(f"exact, kernel {best}", lambda: gpu.assign_on_device(x_ND, levels, nearest=nearest))
    lines += ["", f"Per level at the best tiling, ms: {per_level(x_ND, levels, nearest)}."]
    lines.append("")
    return lines


def per_level(x_ND: torch.Tensor, levels: gpu.Levels, nearest: gpu.Nearest) -> str:
    """Device time of every level's kernel, of its operand, and of settling."""
    marks: list[tuple[str, torch.cuda.Event]] = []

    def mark(name: str) -> None:
        marks.append((name, torch.cuda.Event(enable_timing=True)))
        marks[-1][1].record()

    def marked(rows: gpu.Rows, levels: gpu.Levels, level: int, first: int) -> None:
        mark(f"operand {level}")
        nearest(rows, levels, level, first)
        mark(f"kernel {level}")

    mark("start")
    guessed = gpu.guess(x_ND, levels, marked)
    gpu.settle(x_ND, guessed, levels)
    mark("settle")
    torch.cuda.synchronize()
    return ", ".join(f"{name} {before[1].elapsed_time(at):.2f}" for before, (name, at) in pairwise(marks))


def fit(x_ND: torch.Tensor, size: int, *, iterations: int) -> list[np.ndarray]:
    """Three levels of k-means on residuals."""
    torch.backends.cuda.matmul.allow_tf32 = True
    r_ND, codebooks = x_ND.float(), []
    for _ in range(3):
        codebook_KD, code_N = kmeans_torch(r_ND, size, iterations=iterations, seed=0, device="cuda")
        codebooks.append(codebook_KD)
        r_ND = r_ND - torch.from_numpy(codebook_KD).cuda()[torch.from_numpy(code_N).cuda()]
    torch.backends.cuda.matmul.allow_tf32 = False
    return codebooks


def check(x_ND: torch.Tensor, codebooks: list[np.ndarray], levels: gpu.Levels) -> list[str]:
    """Codes of every tiling against float64 on this GPU, and of a few rows against the CPU's definition."""
    rows = 1 << 17
    x_nD = x_ND[:rows]
    exact_nL = in_float64(x_nD, levels)
    lines, checked = [], 0
    for tiling in TILINGS:
        try:
            guessed = gpu.guess(x_nD, levels, partial(nearest_triton, tiling=tiling))
        except Exception as fault:
            lines.append(f"- {tiling}: {type(fault).__name__}")
            continue
        before = guessed.codes_nL.clone()
        doubts = float((guessed.doubt_n != 0).float().mean())
        many = float((guessed.doubt_n >> gpu.MANY != 0).float().mean())
        left = gpu.settle(x_nD, guessed, levels)
        wrong = int((guessed.codes_nL != exact_nL).any(1).sum())
        corrected = int((guessed.codes_nL != before).any(1).sum())
        if wrong:
            FAILED.append(f"{tiling}: {wrong} of {rows} rows differ from float64")
            lines.append(f"- {FAILED[-1]}: {told_apart(x_nD, guessed, before, exact_nL, levels)}")
        checked += 1
    cpu = 2_000 if len(codebooks[0]) > 1_024 else 20_000
    host_nL = assign_exact(x_nD[:cpu].cpu().numpy(), codebooks)
    same = bool((gpu.assign_on_device(x_nD[:cpu], levels).cpu().numpy() == host_nL).all())
    if not same:
        FAILED.append("GPU and CPU differ")
    lines.append(f"- {seen_error(x_nD[:2_048], levels)}")
    told = f"{left} left to the CPU"
    lines.append(
        f"- {checked} tilings: {rows:,} rows equal float64, {cpu:,} rows equal the CPU's `assign_exact`; "
        f"{doubts:.2%} of rows in doubt ({many:.2%} among three codes or more), {corrected / rows:.3%} "
        f"corrected, {told}."
    )
    return [*lines, ""]


def told_apart(
    x_nD: torch.Tensor, guessed: gpu.Guessed, before: torch.Tensor, exact_nL: torch.Tensor, levels: gpu.Levels
) -> str:
    """What is known of the first wrong row: level, codes guessed, settled and exact, doubt, distances."""
    wrong_nL = guessed.codes_nL != exact_nL
    row = int(wrong_nL.any(1).nonzero()[0, 0])
    level = int(wrong_nL[row].int().argmax())
    r_D = x_nD[row].double()
    for earlier in range(level):
        r_D = r_D - levels.exact[earlier][int(exact_nL[row, earlier])]
    codes = [
        int(codes_nL[row, level]) for codes_nL in (before, guessed.runner_nL, guessed.codes_nL, exact_nL)
    ]
    distance = [float((r_D - levels.exact[level][code]).square().sum()) for code in codes]
    return (
        f"row {row} level {level} doubt {int(guessed.doubt_n[row]):#x}, guess/runner/settled/exact {codes} "
        f"at {distance}, |r| {float(r_D.norm()):.4f}, bounds {gpu.bounds(level, levels)}"
    )


def seen_error(x_nD: torch.Tensor, levels: gpu.Levels) -> str:
    """The largest error of a float16 product with float32 sums here, over |x| |c|, beside the bound taken."""
    half_KD = levels.half_LKD[0]
    exact_nK = x_nD.double() @ half_KD.double().T
    found_nK = torch.mm(x_nD, half_KD.T, out_dtype=torch.float32).double()
    norms_nK = x_nD.double().norm(dim=1)[:, None] * half_KD.double().norm(dim=1).clamp(min=1e-9)
    worst = float(((found_nK - exact_nK).abs() / norms_nK).max())
    taken = gpu.bounds(0, levels)[1] / 2.0 / levels.largest[0]
    return f"A float16 product was off by {worst:.2e} |x| |c| at most; the bound is {taken:.2e}."


def in_float64(x_nD: torch.Tensor, levels: gpu.Levels) -> torch.Tensor:
    """The plain loop in float64."""
    r_nD, codes = x_nD.double(), []
    for codebook_KD in levels.exact:
        code_n = torch.cat(
            [(codebook_KD.square().sum(1) - 2.0 * r @ codebook_KD.T).argmin(1) for r in r_nD.split(1 << 14)]
        )
        codes.append(code_n)
        r_nD = r_nD - codebook_KD[code_n]
    return torch.stack(codes, 1).int()


def eager(x_ND: torch.Tensor, codebooks: list[torch.Tensor]) -> torch.Tensor:
    """What anyone would write, in bf16, by blocks that fit."""
    found = []
    for x_nD in x_ND.split(1 << 19 if len(codebooks[0]) <= 1_024 else 1 << 16):
        r_nD, codes = x_nD, []
        for codebook_KD in codebooks:
            code_n = (codebook_KD.square().sum(1) - 2 * (r_nD @ codebook_KD.T)).argmin(1)
            codes.append(code_n)
            r_nD = r_nD - codebook_KD[code_n]
        found.append(torch.stack(codes, 1))
    return torch.cat(found)


def product_alone(x_ND: torch.Tensor, codebooks: list[torch.Tensor]) -> None:
    """The floor: only the matrix products of all levels."""
    for x_nD in x_ND.split(1 << 19 if len(codebooks[0]) <= 1_024 else 1 << 16):
        for codebook_KD in codebooks:
            torch.mm(x_nD, codebook_KD.T)


def median_ms(work: Callable[[], object], repeats: int = 10) -> float:
    """Median of the device time of `repeats` runs after two to warm up."""
    times = []
    for turn in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if turn > 1:
            times.append(begin.elapsed_time(end))
    return float(np.median(times))


if __name__ == "__main__":
    main()
