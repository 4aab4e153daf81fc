"""Residual assignment, fitting and `quantize sid` on CPU, beside faiss and the bare Parquet work, in one run.

    OMP_WAIT_POLICY=ACTIVE python benchmarks/assign_cpu.py --out benchmarks/results/assign_cpu.md [--large]

Synthetic unit vectors around clusters. Runs alternate between paths, so that load meets all alike. CPU
seconds are given beside wall seconds: waiting for a busy core counts in the one and not in the other, and
spinning threads (the ACTIVE policy, faiss at its best on idle cores) count in both.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

# Threads that spin for a core which is busy slow down whoever waits for them: off unless asked for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import faiss
import numpy as np
import polars as pl
import torch
from peers import faiss_residual as peer

from prerank_tools.quantizers.assign import assign_exact
from prerank_tools.quantizers.assign_cpu import assign_cpu
from prerank_tools.quantizers.rkmeans import RKMeans
from prerank_tools.quantizers.stage import QuantizeSids
from prerank_tools.run.job import RunOptions, run
from prerank_tools.tables.vectors import numpy_to_vectors

DIMS, SIZES = 256, (256, 256, 256)


def main() -> None:
    """Measure, write, print."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--out", type=Path, default=Path("assign_cpu.md"))
    words.add_argument("--rows", type=int, default=200_000)
    words.add_argument("--threads", type=int, default=2)
    words.add_argument("--rounds", type=int, default=7)
    words.add_argument("--fit-rows", type=int, default=65_536)
    words.add_argument("--sections", nargs="+", default=["assignment", "fitting", "parquet"])
    words.add_argument(
        "--large", action="store_true", help="10 million rows, Parquet to Parquet, with memory"
    )
    given = words.parse_args()
    faiss.omp_set_num_threads(given.threads)
    torch.set_num_threads(given.threads)
    x_ND = clustered(given.rows)
    codebooks = list(RKMeans(sizes=SIZES, iterations=10, init="random").fit(x_ND[:32_768], seed=1).codebooks)
    lines = heading(given)
    if "assignment" in given.sections:
        lines += assignment(x_ND, codebooks, given.threads, given.rounds)
    if "fitting" in given.sections:
        lines += fitting(x_ND[: given.fit_rows], given.threads, max(1, given.rounds // 2))
    if "parquet" in given.sections:
        lines += parquet(x_ND, given.threads, given.rounds)
    if given.large:
        lines += large(codebooks, given.threads)
    text = "\n".join(lines) + "\n"
    given.out.write_text(text)
    print(text)


def heading(given: argparse.Namespace) -> list[str]:
    """Where, with what, how."""
    with Path("/proc/cpuinfo").open() as stream:
        cpu = next(
            (line.split(":")[1].strip() for line in stream if "model name" in line), platform.machine()
        )
    with Path("/proc/loadavg").open() as stream:
        load = stream.read().split()[0]
    versions = ", ".join(f"{name} {version(name)}" for name in ("faiss-cpu", "torch", "numba", "polars"))
    return [
        "# Residual assignment on CPU", "",
        f"`OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']} python benchmarks/assign_cpu.py "
        f"--rows {given.rows} --rounds {given.rounds} --fit-rows {given.fit_rows} "
        f"--sections {' '.join(given.sections)}"
        f"{' --large' if given.large else ''}`",
        f"on {cpu}, {os.cpu_count()} cores, {versions}, Python {platform.python_version()},",
        f"{datetime.now(UTC):%Y-%m-%d}, seed 0. Load average at the start {load}. Paths alternate; "
        f"medians of {given.rounds}. Ratios are of wall time: how many times ours the peer's is.", "",
    ]  # fmt: skip


def clustered(rows: int, *, seed: int = 0) -> np.ndarray:
    """Unit vectors: 2,000 clusters of Zipf size, most of the length from the cluster."""
    rng = np.random.default_rng(seed)
    centre_CD = rng.standard_normal((2_000, DIMS), dtype=np.float32)
    centre_CD /= np.linalg.norm(centre_CD, axis=1, keepdims=True)
    share_C = 1.0 / np.sqrt(np.arange(1, 2_001))
    x_ND = centre_CD[rng.choice(2_000, rows, p=share_C / share_C.sum())]
    x_ND += 0.6 * rng.standard_normal(x_ND.shape, dtype=np.float32) / np.sqrt(np.float32(DIMS))
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def assignment(x_ND: np.ndarray, codebooks: list[np.ndarray], threads: int, rounds: int) -> list[str]:
    """In memory: ours and three faiss paths on one thread and on all, and whether their codes are right."""
    exact_NL = assign_exact(x_ND, codebooks)
    lines = [f"## {len(x_ND):,} x {DIMS} at 3 x 256, in memory", ""]
    lines += [
        "| threads | path | rows/s | CPU us/row | x flat loop | x RQ beam 1 | x RQ LUT | unlike float64 |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for count in sorted({1, threads}):
        faiss.omp_set_num_threads(count)
        torch.set_num_threads(count)
        paths: dict[str, Callable[[], np.ndarray]] = {
            "ours, exact": lambda count=count: assign_cpu(x_ND, codebooks, threads=count),
            "faiss IndexFlatL2 loop": lambda: peer.flat_loop(x_ND, codebooks),
        }
        for name, table in (("beam 1", False), ("beam 1, LUT", True)):
            encode = peer.residual_quantizer(codebooks, beam=1, table=table)
            paths[f"faiss ResidualQuantizer {name}"] = lambda encode=encode: encode(x_ND)
        wall, cpu = alternate(paths, rounds)
        middle = {name: float(np.median(times)) for name, times in wall.items()}
        for name in paths:
            wrong = int((paths[name]()[:, :3] != exact_NL).any(axis=1).sum())
            ratios = " | ".join(f"{middle[other] / middle[name]:.2f}" for other in list(paths)[1:])
            lines.append(
                f"| {count} | {name} | {len(x_ND) / middle[name]:,.0f} | "
                f"{np.median(cpu[name]) / len(x_ND) * 1e6:.2f} | {ratios} | {wrong} |"
            )
    return [*lines, ""]


def fitting(x_ND: np.ndarray, threads: int, rounds: int) -> list[str]:
    """Seconds to fit and the error reached, ours and the plain faiss loop."""
    fitted: dict[str, list[np.ndarray]] = {}

    def ours() -> np.ndarray:
        fitted["ours"] = list(
            RKMeans(sizes=SIZES, iterations=25, init="random").fit(x_ND, seed=1, threads=threads).codebooks
        )
        return fitted["ours"][0]

    def theirs() -> np.ndarray:
        fitted["faiss loop"] = peer.fit_loop(x_ND, SIZES, iterations=25, seed=1)
        return fitted["faiss loop"][0]

    wall, cpu = alternate({"ours": ours, "faiss loop": theirs}, rounds)
    lines = [f"## Fitting 3 x 256 on {len(x_ND):,} x {DIMS}, 25 iterations", ""]
    lines += ["| path | seconds | CPU seconds | relative error |", "|---|---|---|---|"]
    for name, times in wall.items():
        codes_NL = assign_cpu(x_ND, fitted[name], threads=threads)
        rest_ND = x_ND - sum(c_KD[codes_NL[:, level]] for level, c_KD in enumerate(fitted[name]))
        error = float((rest_ND**2).sum() / (x_ND**2).sum())
        lines.append(f"| {name} | {np.median(times):.2f} | {np.median(cpu[name]):.2f} | {error:.6f} |")
    same = all((a == b).all() for a, b in zip(*fitted.values(), strict=True))
    return [*lines, "", f"Centroids equal bit for bit: {'yes' if same else 'no'}.", ""]


def parquet(x_ND: np.ndarray, threads: int, rounds: int) -> list[str]:
    """The stage, Parquet to Parquet with a given codebook, beside reading and writing the same table.

    The other side is polars' own reading of all columns and writing of them again, uncompressed and in row
    groups of the same size: no fsync, no checksum, no check of a value.
    """
    folder = Path(tempfile.mkdtemp(prefix="assign_cpu_"))
    write(folder / "emb.parquet", x_ND, 0)
    run(QuantizeSids(folder / "emb.parquet"), folder / "fit", RunOptions(workers=1, threads=threads))

    def stage() -> np.ndarray:
        shutil.rmtree(folder / "out", ignore_errors=True)
        work = QuantizeSids(folder / "emb.parquet", codebook=folder / "fit")
        run(work, folder / "out", RunOptions(workers=1, threads=threads))
        return x_ND[:0]

    def rewrite() -> np.ndarray:
        frame = pl.read_parquet(folder / "emb.parquet")
        frame.write_parquet(folder / "copy.parquet", compression="uncompressed", row_group_size=16_384)
        return x_ND[:0]

    wall, cpu = alternate({"quantize sid": stage, "read and write the table": rewrite}, rounds)
    shutil.rmtree(folder)
    base = np.median(cpu["read and write the table"])
    lines = [f"## Parquet to Parquet, {len(x_ND):,} x {DIMS} float32, one worker", ""]
    lines += ["| path | seconds | rows/s | CPU seconds | ratio of CPU |", "|---|---|---|---|---|"]
    for name, times in wall.items():
        middle, spent = float(np.median(times)), float(np.median(cpu[name]))
        lines.append(
            f"| {name} | {middle:.2f} | {len(x_ND) / middle:,.0f} | {spent:.2f} | {spent / base:.2f} |"
        )
    return [*lines, ""]


def large(codebooks: list[np.ndarray], threads: int, *, rows: int = 10_000_000) -> list[str]:
    """Ten million rows in 40 float16 parts: seconds and the peak memory of the process."""
    folder = Path(tempfile.mkdtemp(prefix="assign_large_"))
    (folder / "emb").mkdir()
    for part in range(40):
        x_nD = clustered(rows // 40, seed=part).astype(np.float16)
        write(folder / "emb" / f"part-{part:05d}.parquet", x_nD, part * rows // 40)
    started = time.perf_counter()
    RKMeans(sizes=SIZES, codebooks=tuple(codebooks)).to_codebook().save(folder / "codebook")
    work = QuantizeSids(folder / "emb", codebook=folder / "codebook", collisions="suffix")
    run(work, folder / "out", RunOptions(workers=1, threads=threads, gate="warn"))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    shutil.rmtree(folder)
    return [
        f"## {rows:,} x {DIMS} float16, Parquet to Parquet", "",
        f"`quantize sid --codebook C --collisions suffix`: {seconds:.0f} s ({rows / seconds:,.0f} rows/s), "
        f"peak memory of the process {peak:.1f} GB.", "",
    ]  # fmt: skip


def write(path: Path, x_ND: np.ndarray, first: int) -> None:
    """A table of item embeddings."""
    ids = pl.Series("item_id", np.arange(first, first + len(x_ND)))
    frame = pl.DataFrame([ids, numpy_to_vectors("embedding", x_ND)])
    frame.write_parquet(path, compression="uncompressed", row_group_size=16_384)


def alternate(
    paths: dict[str, Callable[[], np.ndarray]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(wall, CPU) seconds of every path in turn, after one untimed turn."""
    wall: dict[str, list[float]] = {name: [] for name in paths}
    cpu: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(rounds + 1):
        for name, path in paths.items():
            started, spent = time.perf_counter(), time.process_time()
            path()
            if turn:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - spent)
    return wall, cpu


if __name__ == "__main__":
    main()
