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
from pathlib import Path

import numpy as np
import torch
import triton

from prerank_tools.quantizers import assign_torch as gpu
from prerank_tools.quantizers.assign import assign_exact
from prerank_tools.quantizers.assign_hopper import bounds as hopper_bounds
from prerank_tools.quantizers.assign_hopper import guess_hopper, settle_hopper
from prerank_tools.quantizers.assign_levels import MANY, Levels, bounds, put_levels
from prerank_tools.quantizers.assign_triton import nearest_triton
from prerank_tools.quantizers.kmeans_torch import kmeans_torch

FAILED: list[str] = []
CHECKED = 1 << 19  # rows held against float64 at once


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
        "`assign_on_device`: products and argmins, then rows in doubt in float64; its codes equal the "
        "float64 definition. \"Guess\" is the part before float64. \"Triton\" is the path of cards before "
        "Hopper. \"Eager\" is the plain loop in bf16 (product, argmin, subtraction), which is not exact. "
        "Medians of 10.", "",
    ]  # fmt: skip
    for decay in (0.5, 0.0):
        x_ND = clustered(given.rows, given.dims, decay=decay)
        lines += [
            "",
            f"# Spectrum decaying as i^-{decay}" if decay else "# Flat spectrum: small gaps everywhere",
        ]
        for size, rows in ((256, given.rows), (8_192, given.rows // 8)):
            lines += measure(x_ND[:rows], size)
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


def measure(x_ND: torch.Tensor, size: int) -> list[str]:
    """One section: fit, check, time."""
    started = time.perf_counter()
    codebooks = fit(x_ND[: 1 << 19], size, iterations=25 if size <= 1_024 else 8)
    fitted = time.perf_counter() - started
    levels = put_levels(codebooks, "cuda")
    lines = [f"## 3 x {size}", "", f"Fitted on {min(len(x_ND), 1 << 19):,} rows in {fitted:.1f} s.", ""]
    lines += check(x_ND, codebooks, levels)
    lines += ["| path | M vectors/s | ms | TFLOP/s of the product |", "|---|---|---|---|"]
    flop = 2.0 * len(x_ND) * x_ND.shape[1] * 3 * size

    def row(name: str, work: Callable[[], object]) -> None:
        ms = median_ms(work)
        lines.append(f"| {name} | {len(x_ND) / ms / 1e3:.1f} | {ms:.3f} | {flop / ms / 1e9:.0f} |")

    narrow_ND = x_ND.bfloat16()
    narrow = [torch.from_numpy(codebook_KD).cuda().bfloat16() for codebook_KD in codebooks]
    row("eager bf16", lambda: eager(narrow_ND, narrow))
    row("product alone, bf16", lambda: product_alone(narrow_ND, narrow))
    row("Triton, guess", lambda: gpu.guess(x_ND, levels, nearest_triton))
    row("Triton, exact", lambda: gpu.assign_on_device(x_ND, levels, nearest=nearest_triton))
    row("guess", lambda: guess_hopper(x_ND, levels))
    row("exact", lambda: gpu.assign_on_device(x_ND, levels))
    return [*lines, ""]


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


def check(x_ND: torch.Tensor, codebooks: list[np.ndarray], levels: Levels) -> list[str]:
    """Codes of every row by both paths against float64 on this GPU, of a few against the CPU's definition."""
    corrected = doubts = many = left = 0
    for x_nD in x_ND.split(CHECKED):
        exact_nL = in_float64(x_nD, levels)
        found = guess_hopper(x_nD, levels)
        corrected += int((found.guessed.codes_nL != exact_nL).any(1).sum())
        doubts += int((found.guessed.doubt_n != 0).sum())
        many += int((found.guessed.doubt_n >> MANY != 0).sum())
        left += settle_hopper(x_nD, found, levels)
        for name, codes_nL in (
            ("Hopper", found.guessed.codes_nL),
            ("Triton", gpu.assign_on_device(x_nD, levels, nearest=nearest_triton)),
        ):
            wrong = int((codes_nL != exact_nL).any(1).sum())
            if wrong:
                FAILED.append(f"{name}: {wrong} of {len(x_nD)} rows differ from float64")
    cpu, n = 2_000 if len(codebooks[0]) > 1_024 else 20_000, len(x_ND)
    host_nL = assign_exact(x_ND[:cpu].cpu().numpy(), codebooks)
    if not (gpu.assign_on_device(x_ND[:cpu], levels).cpu().numpy() == host_nL).all():
        FAILED.append("GPU and CPU differ")
    return [
        f"- {seen_error(x_ND[:2_048], levels)}",
        f"- All {n:,} rows equal float64 on either path, {cpu:,} equal the CPU's `assign_exact`: "
        f"{'; '.join(FAILED) or 'yes'}. {doubts / n:.2%} of rows in doubt ({many / n:.2%} among three codes "
        f"or more), {corrected / n:.3%} corrected, {left} left to the CPU.",
        "",
    ]


def seen_error(x_nD: torch.Tensor, levels: Levels) -> str:
    """The largest errors of float16 products with float32 sums, over |x| |c|, beside the bounds taken."""
    taken, wide = (of(0, levels)[1] / 2.0 / levels.largest[0] for of in (hopper_bounds, bounds))
    return (
        f"A float16 product was off by {product_error(x_nD, levels.half_LKD[0]):.2e} |x| |c| at most, by "
        f"{built_error(x_nD.shape[1]):.2e} on vectors built to lose the most; the bound is {taken:.2e}, of "
        f"Triton's path {wide:.2e}."
    )


def product_error(x_nD: torch.Tensor, c_KD: torch.Tensor) -> float:
    """The largest |error| of a product over the norms of its vectors."""
    exact_nK = x_nD.double() @ c_KD.double().T
    found_nK = torch.mm(x_nD, c_KD.T, out_dtype=torch.float32).double()
    norms_nK = x_nD.double().norm(dim=1)[:, None] * c_KD.double().norm(dim=1).clamp(min=1e-9)
    return float(((found_nK - exact_nK).abs() / norms_nK).max())


def built_error(dims: int) -> float:
    """One product of 1, then small ones that vanish below the last bit kept of it; the worst size of them."""
    x_nD = torch.ones(64, dims, dtype=torch.float16, device="cuda")
    x_nD[:, 1:] = (2.0 ** -torch.arange(8, 15, 0.11, device="cuda")[:64, None]).half()
    return max(product_error(*[x_D.expand(128, -1).contiguous()] * 2) for x_D in x_nD)


def in_float64(x_nD: torch.Tensor, levels: Levels) -> torch.Tensor:
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
