"""GSU on the CPU beside what one would write without it: in memory, Parquet to Parquet, and how it grows.

    OMP_WAIT_POLICY=ACTIVE python benchmarks/gsu_cpu.py --data DIR --out benchmarks/results/gsu_cpu.md

DIR holds ml-latest-small-mm and online-retail-ii. Everything runs in one process, turn by turn.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import faiss
import numba
import numpy as np
import polars as pl
import torch
from peers import gsu_baselines as peers
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from prerank_tools.gsu.search import Groups, topk
from prerank_tools.gsu.simtier import simtier
from prerank_tools.gsu.stage import GsuTopK
from prerank_tools.run.job import RunOptions, run
from prerank_tools.tables.vectors import numpy_to_vectors

K = 50


def main() -> None:
    """Measure, write."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--data", type=Path, required=True)
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--threads", type=int, default=2)
    words.add_argument("--repeats", type=int, default=5)
    words.add_argument("--sections", nargs="+", default=["in_memory", "parquet_to_parquet", "growth"])
    given = words.parse_args()
    torch.set_num_threads(given.threads)
    faiss.omp_set_num_threads(given.threads)
    lines = [
        "# GSU on the CPU",
        "",
        f"`OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'PASSIVE')} python benchmarks/gsu_cpu.py "
        f"--data DIR --repeats {given.repeats} --sections {' '.join(given.sections)}`,",
        f"{versions()}.",
        "",
    ]
    for name in given.sections:
        lines += globals()[name](given)
        given.out.write_text("\n".join(lines) + "\n")
        print("\n".join(lines), flush=True)


def versions() -> str:
    """Where and with what."""
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    return (
        f"{model.split(':')[1].strip()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, "
        f"Python {platform.python_version()}, torch {torch.__version__}, faiss {faiss.__version__},\n"
        f"numba {numba.__version__}, polars {pl.__version__}, "
        f"numpy {np.__version__}; {datetime.now(UTC):%Y-%m-%d}, seed 0"
    )


def in_memory(given: argparse.Namespace) -> list[str]:
    """300 users x 50 candidates x 2,000 behaviours, d 128, K 50; ours converts to bf16 inside the clock."""
    users, candidates, history, dims = 300, 50, 2000, 128
    rng = np.random.default_rng(0)
    table = rng.standard_normal((users * (history + candidates), dims), dtype=np.float32)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    groups = dense_groups(users, candidates, history)
    past = table[: users * history].reshape(users, history, dims)
    asked = table[users * history :].reshape(users, candidates, dims)
    halves = table.astype(np.float16)
    pairs = users * candidates
    exact = topk(table, groups, k=K, recent=0, threads=given.threads).positions_MK
    lines = [f"## {in_memory.__doc__}", "", "CPU time is what the process used: waiting for a core is not in"]
    lines += ["it, spinning threads are. NumPy's product has both cores in either half of the table.", ""]
    lines += [
        "| threads | what | pairs/s | against faiss | pairs/s of CPU time | against faiss | exact order |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for threads in (1, given.threads):
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        ours = partial(topk, table, groups, k=K, recent=0, threads=threads)
        work: dict[str, Callable[[], object]] = {
            "faiss.knn a user": lambda: peers.faiss_knn(past, asked, K),
            "numpy product + argpartition + sort": lambda: peers.argpartition(past, asked, K),
            "torch bmm + topk, fp32": lambda: peers.bmm_topk(past, asked, K, torch.float32),
            "torch bmm + topk, bf16": lambda: peers.bmm_topk(past, asked, K, torch.bfloat16),
            "ours, exact lists": ours,
            "ours, float16 stored": partial(topk, halves, groups, k=K, recent=0, threads=threads),
            "ours, lists and both histograms": partial(both, table, groups, threads),
        }
        wall, used = alternate(work, given.repeats)
        for name in work:
            order = ""
            if not name.startswith(("ours, l", "ours, f")):
                order = f"{(np.asarray(positions(work[name]())) == exact).all(-1).mean():.1%}"
            lines.append(
                f"| {threads} | {name} | {pairs / wall[name]:,.0f} | {ratio(wall, name):.2f} | "
                f"{pairs / used[name]:,.0f} | {ratio(used, name):.2f} | {order} |"
            )
    return [*lines, ""]


def ratio(seconds: dict[str, float], name: str) -> float:
    """How many times faster than faiss."""
    return seconds["faiss.knn a user"] / seconds[name]


def positions(found: object) -> np.ndarray:
    """Positions (M, K) of any of them."""
    found = getattr(found, "positions_MK", found)
    return np.asarray(found).reshape(-1, K)


def both(table: np.ndarray, groups: Groups, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists, their histogram and that of the 50 latest."""
    found = topk(table, groups, k=K, threads=threads)
    return simtier(found.sims_MK), simtier(found.recent_MS)


def dense_groups(users: int, candidates: int, history: int) -> Groups:
    """Every user with as many behaviours and candidates, every vector its own row."""
    return Groups(
        np.arange(users * history),
        np.arange(users + 1) * history,
        np.arange(users * history, users * (history + candidates)),
        np.arange(users + 1) * candidates,
        np.full(users * candidates, history),
    )


def parquet_to_parquet(given: argparse.Namespace) -> list[str]:
    """Each user asks about 100 random items at the time of the last event; TF-IDF vectors of 128 dims."""
    lines = ["## Parquet to Parquet", "", str(parquet_to_parquet.__doc__), ""]
    lines += [
        "| data | requests | rows | script s (CPU s) | gsu topk s (CPU s) | ratio | of CPU | equal sims |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name in ("ml-latest-small-mm", "online-retail-ii"):
        with tempfile.TemporaryDirectory() as where:
            folder = Path(where)
            prepare(given.data / name, folder)
            paths = [folder / f"{table}.parquet" for table in ("events", "requests", "embeddings")]
            stage = GsuTopK(events=paths[0], requests=paths[1], embeddings=paths[2])
            options = RunOptions(workers=1, threads=given.threads, overwrite=True)
            turn = iter(range(1000))
            wall, used = alternate(
                {
                    "script": partial(peers.polars_numpy, *paths, folder / "script.parquet"),
                    "ours": lambda: run(stage, folder / f"gsu-{next(turn)}", options),  # noqa: B023
                },
                given.repeats,
            )
            script = pl.read_parquet(folder / "script.parquet")
            ours = pl.read_parquet(folder / "gsu-0" / "data" / "*.parquet").sort("request_id", "item_id")
            near = ours.select("request_id", "item_id", "sims").join(script, on=["request_id", "item_id"])
            gaps = [
                np.abs(np.array(a, dtype=np.float32) - np.array(b[: len(a)], dtype=np.float32)).max(initial=0)
                for a, b in zip(near["sims"], near["sims_right"].fill_null([]), strict=True)
                if b is not None and len(a)
            ]
            asked = pl.read_parquet(paths[1]).height
            lines.append(
                f"| {name} | {asked} | {len(ours):,} | {wall['script']:.2f} ({used['script']:.2f}) | "
                f"{wall['ours']:.2f} ({used['ours']:.2f}) | {wall['script'] / wall['ours']:.2f} | "
                f"{used['script'] / used['ours']:.2f} | {np.mean(np.array(gaps) < 2e-3):.1%} |"
            )
    return [*lines, ""]


def prepare(source: Path, folder: Path) -> None:
    """Events, requests and embeddings of a data set as a user would hand them in."""
    rng = np.random.default_rng(0)
    events = pl.read_parquet(source / "interactions.parquet").select("user_id", "item_id", "timestamp")
    items = pl.read_parquet(source / "items.parquet")
    text = items["title"].fill_null("")
    if "overview" in items.columns:
        text = text + " " + items["genres"].list.join(" ") + " " + items["overview"].fill_null("")
    matrix = TfidfVectorizer(min_df=2, max_features=20_000).fit_transform(text.to_list())
    vectors = TruncatedSVD(128, random_state=0).fit_transform(matrix).astype(np.float32)
    usable = np.abs(vectors).sum(1) > 1e-6
    embeddings = items.select("item_id").with_columns(numpy_to_vectors("embedding", vectors))
    embeddings = embeddings.filter(pl.Series(usable))
    events.write_parquet(folder / "events.parquet")
    embeddings.write_parquet(folder / "embeddings.parquet")
    asked = events.group_by("user_id").agg(pl.col("timestamp").max())
    asked = (
        asked.sort("user_id").with_row_index("request_id").with_columns(pl.col("request_id").cast(pl.Int64))
    )
    ids = embeddings["item_id"]
    chosen = [ids.gather(rng.choice(len(ids), 100, replace=False)).to_list() for _ in range(len(asked))]
    asked.with_columns(pl.Series("candidates", chosen)).write_parquet(folder / "requests.parquet")


def growth(given: argparse.Namespace) -> list[str]:
    """One user: time a pair and behaviour, memory beyond the vectors, as histories and candidates grow."""
    lines = ["## Growth", "", str(growth.__doc__), ""]
    lines += ["| behaviours | candidates | s | CPU s | CPU ns a pair and behaviour | peak MB more |"]
    lines += ["|---|---|---|---|---|---|"]
    rng = np.random.default_rng(0)
    shapes = [(n, 50) for n in (1_000, 10_000, 100_000, 1_000_000)] + [
        (4096, c) for c in (1, 10, 100, 1_000, 10_000)
    ]
    table = rng.standard_normal((1_000_000 + 10_000, 128), dtype=np.float32)
    for history, candidates in shapes:
        part = np.concatenate([table[:history], table[-candidates:]])
        groups = dense_groups(1, candidates, history)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        timed = alternate({"": partial(topk, part, groups, k=K, recent=0, threads=given.threads)}, 3)
        seconds, spent = timed[0][""], timed[1][""]
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        lines.append(
            f"| {history:,} | {candidates:,} | {seconds:.4f} | {spent:.4f} | "
            f"{spent * 1e9 / history / candidates:.3f} | {peak:.0f} |"
        )
    return [*lines, ""]


def alternate(
    work: dict[str, Callable[[], object]], repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each, by the clock and of CPU, taken in turns after one round that warms up."""
    wall: dict[str, list[float]] = {name: [] for name in work}
    used: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, call in work.items():
            start, spent = time.perf_counter(), time.process_time()
            call()
            if turn:
                wall[name].append(time.perf_counter() - start)
                used[name].append(time.process_time() - spent)
    return tuple({name: float(np.median(times)) for name, times in kind.items()} for kind in (wall, used))  # type: ignore[return-value]


if __name__ == "__main__":
    main()
