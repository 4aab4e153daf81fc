"""Quality of every quantizer beside its peers: two catalogues, 3 x 256 and 4 x 256, five seeds.

    python benchmarks/title_vectors.py --data DIR --cache VECTORS
    python benchmarks/quantizers.py --vectors VECTORS --out FOLDER --workers 4 --threads 4

Needs numpy, torch, faiss, pydantic and accelerate; `vector-quantize-pytorch` and einx for that peer's rows.
Finished rows are kept in FOLDER/quantizers.jsonl: a killed run goes on. FOLDER/quantizers.md is the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from title_vectors import CATALOGUES, Catalogue, load

K = 256
SHAPES = ((K,) * 3, (K,) * 4)
QUERIES = 5_000
KINDS = (
    "RQ-KMeans",
    "RQ-KMeans, progressive",
    "RQ-KMeans, refined",
    "RQ-KMeans, refined, beam 5",
    "RQ-KMeans, refined, beam 16",
    "balanced RQ-KMeans (last)",
    "RQ-KMeans+",
    "RQ-KMeans + FSQ",
    "RQ-VAE",
    "OPQ",
    "random hash",
    "faiss RQ, beam 1",
    "faiss RQ, beam 5",
    "faiss RQ, beam 16",
    "faiss PQ",
    "lucidrains ResidualVQ",
)
Task = tuple[str, int, str, int, bool]  # catalogue, levels, kind, seed, fitted on nine tenths
PEER_STEPS = 1_000  # of a training that counts epochs: as many as our RQ-VAE takes
REFINE_ROUNDS = 30


def main() -> None:
    """Run what is missing, then write the table."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--vectors", type=Path, required=True)
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--seeds", type=int, default=5)
    words.add_argument("--rqvae-seeds", type=int, default=0, help="more seeds of RQ-VAE at 3 x 256")
    words.add_argument("--held-out", action="store_true", help="also fits on nine tenths, at 3 x 256")
    words.add_argument("--kinds", nargs="*", default=list(KINDS))
    words.add_argument("--workers", type=int, default=1)
    words.add_argument("--threads", type=int, default=2)
    words.add_argument("--device", default="cpu")
    words.add_argument("--seconds", type=float, default=1e9, help="start nothing after this long")
    args = words.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "quantizers.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    tasks = [task for task in wanted(args) if task not in {key_of(row) for row in rows}]
    started = time.monotonic()
    # Spawned, so that every library of a worker starts with this many threads.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(args.threads))
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(measure, *task, args, started) for task in tasks]
        for done in as_completed(running):
            if done.exception() is not None:
                print(f"failed: {done.exception()!r}", file=sys.stderr)
            elif (row := done.result()) is not None:
                rows.append(row)
                with kept.open("a") as out:
                    out.write(json.dumps(row) + "\n")
    (args.out / "quantizers.md").write_text(report(rows, args))


def wanted(args: argparse.Namespace) -> list[Task]:
    """One seed of everything before the next, then RQ-VAE's further seeds, then the fits on nine tenths."""
    tasks = [
        (name, len(shape), kind, seed, False)
        for seed in range(args.seeds)
        for name in CATALOGUES
        for shape in SHAPES
        for kind in args.kinds
    ]
    more = range(args.seeds, args.rqvae_seeds)
    tasks += [(name, 3, "RQ-VAE", seed, False) for seed in more for name in CATALOGUES]
    held = [(name, 3, kind, 0, True) for name in CATALOGUES for kind in args.kinds if kind != "random hash"]
    return tasks + held if args.held_out else tasks


def key_of(row: dict[str, Any]) -> Task:
    """What a row measured."""
    return row["catalogue"], row["levels"], row["kind"], row["seed"], row.get("held_out", False)


def measure(
    name: str, levels: int, kind: str, seed: int, held_out: bool, args: argparse.Namespace, started: float
) -> dict[str, Any] | None:
    """Fit one quantizer and judge it on its whole catalogue; None once the time is up.

    `held_out` fits on nine tenths of the titles instead and gives the error of both parts.
    """
    if time.monotonic() - started > args.seconds:
        return None
    from prerank_tools.quantizers import assign as assignment

    assignment.SMALL_WORK = 10**15  # the plain float64 path: this script measures quality
    catalogue = load(name, args.vectors)
    left_N = left_out(catalogue.title_N) if held_out else np.zeros(len(catalogue.x_ND), dtype=bool)
    fit_ND = catalogue.x_ND[~left_N]
    quantizer = make(kind, (K,) * levels, len(fit_ND))
    on_device = kind in ("RQ-VAE", "RQ-KMeans+", "RQ-KMeans + FSQ")
    start = time.perf_counter()
    quantizer.fit(fit_ND, seed=seed, threads=args.threads, device=args.device if on_device else "cpu")
    row = {"catalogue": name, "levels": levels, "kind": kind, "seed": seed, "held_out": held_out}
    row["fit_seconds"] = time.perf_counter() - start
    if held_out:
        parts = {"error_fitted": fit_ND, "error_left_out": catalogue.x_ND[left_N]}
        return row | {part: relative_error(quantizer, x_ND, args.threads) for part, x_ND in parts.items()}
    codes_NL = np.asarray(quantizer.encode(catalogue.x_ND, threads=args.threads))
    return row | judged(quantizer, codes_NL, catalogue)


def left_out(title_N: np.ndarray) -> np.ndarray:
    """The items of a tenth of the titles: equal titles stay on one side."""
    return (np.random.default_rng(0).random(title_N.max() + 1) < 0.1)[title_N]


def relative_error(quantizer: Any, x_ND: np.ndarray, threads: int) -> float:
    """Sum of squares that coding leaves, over that of the vectors."""
    left_ND = x_ND - quantizer.decode(np.asarray(quantizer.encode(x_ND, threads=threads)))
    return float((left_ND**2).sum() / (x_ND**2).sum())


def judged(quantizer: Any, codes_NL: np.ndarray, catalogue: Catalogue) -> dict[str, Any]:
    """All numbers of one codebook, by the library's own judge."""
    from prerank_tools.quantizers.duplicates import content_groups, duplicate_floor
    from prerank_tools.quantizers.sid_meaning import behavior_lift, prefix_meaning
    from prerank_tools.quantizers.sid_metrics import Reconstruction, SidCounts

    sizes = (K,) * codes_NL.shape[1]
    counts, error = SidCounts(sizes), Reconstruction()
    counts.update(codes_NL)
    decoded_ND = quantizer.decode(codes_NL)
    error.update(catalogue.x_ND, decoded_ND)
    use = counts.finalize()
    found: dict[str, Any] = {
        **error.finalize(),
        "recall": recall(codes_NL, decoded_ND, catalogue, sizes),
        "collision_above_floor": use.collision_rate - duplicate_floor(content_groups(catalogue.title_N)),
        "used": [level.used for level in use.levels],
        "perplexity": [level.perplexity for level in use.levels],
        "gini": use.gini,
    }
    if catalogue.category_N.max() > 0:
        known = catalogue.category_N >= 0
        top, second = prefix_meaning(codes_NL[known, :2], catalogue.category_N[known], sizes=sizes[:2])
        found |= {"purity_1": top.purity, "nmi_1": top.nmi, "purity_2": second.purity}
    if len(catalogue.left_E):
        lift = behavior_lift(codes_NL[:, :1], catalogue.left_E, catalogue.right_E, sizes=sizes[:1])
        found["lift_1"] = lift[0].lift
    return found


def recall(
    codes_NL: np.ndarray, decoded_ND: np.ndarray, catalogue: Catalogue, sizes: tuple[int, ...]
) -> float:
    """Neighbour recall@10, decoded queries against decoded items, fair to ties."""
    from prerank_tools.quantizers.neighbours import nearest_rows, neighbour_recall, sample_rows
    from prerank_tools.quantizers.sid_keys import pack_codes

    query_Q = sample_rows(len(codes_NL), QUERIES)
    _, truth_QT = nearest_rows(catalogue.x_ND[query_Q], [catalogue.x_ND], k=10, skip_Q=query_Q)
    key_N = pack_codes(codes_NL, sizes)
    key_M, first_M, count_M = np.unique(key_N, return_index=True, return_counts=True)
    recall_Q = neighbour_recall(
        key_N[truth_QT],
        decoded_ND[query_Q],
        key_N[query_Q],
        key_M=key_M,
        count_M=count_M,
        blocks=[decoded_ND[first_M]],
    )
    return float(recall_Q.mean())


def make(kind: str, sizes: tuple[int, ...], rows: int) -> Any:
    """An unfitted quantizer at its defaults; trainings take steps, so that both catalogues get the same."""
    from prerank_tools.quantizers.balanced import BalancedRKMeans
    from prerank_tools.quantizers.fsq import FSQConfig, RKMeansFSQ
    from prerank_tools.quantizers.pq import ProductQuantizer
    from prerank_tools.quantizers.random_hash import RandomHash
    from prerank_tools.quantizers.rkmeans import RKMeans
    from prerank_tools.quantizers.rkmeans_plus import RKMeansPlus, RKMeansPlusConfig
    from prerank_tools.quantizers.rqvae import RQVAE
    from prerank_tools.quantizers.rqvae_net import RQVAEConfig

    def epochs(steps: int) -> int:
        return max(1, round(steps / (-(-rows // 1_024))))

    def refined(beam: int) -> Any:
        return RKMeans(sizes=sizes, init="progressive", beam=beam, refine=REFINE_ROUNDS)

    def peer_faiss(beam: int) -> Any:
        from peers.faiss_rq import FaissQuantizer

        return FaissQuantizer(sizes, beam=beam)

    def peer_rvq() -> Any:
        from peers.vector_quantize_rvq import LucidrainsRVQ

        return LucidrainsRVQ(sizes, epochs=epochs(PEER_STEPS))

    makers: dict[str, Callable[[], Any]] = {
        "RQ-KMeans": lambda: RKMeans(sizes=sizes),
        "RQ-KMeans, progressive": lambda: RKMeans(sizes=sizes, init="progressive"),
        "RQ-KMeans, refined": lambda: refined(1),
        "RQ-KMeans, refined, beam 5": lambda: refined(5),
        "RQ-KMeans, refined, beam 16": lambda: refined(16),
        "balanced RQ-KMeans (last)": lambda: BalancedRKMeans(sizes=sizes),
        "RQ-KMeans+": lambda: RKMeansPlus(RKMeansPlusConfig(sizes=sizes)),
        "RQ-KMeans + FSQ": lambda: RKMeansFSQ(FSQConfig(sizes=sizes[:-1])),
        "RQ-VAE": lambda: RQVAE(RQVAEConfig(sizes=sizes)),
        "OPQ": lambda: ProductQuantizer(sizes=sizes),
        "random hash": lambda: RandomHash(sizes=sizes),
        "faiss RQ, beam 1": lambda: peer_faiss(1),
        "faiss RQ, beam 5": lambda: peer_faiss(5),
        "faiss RQ, beam 16": lambda: peer_faiss(16),
        "faiss PQ": lambda: peer_faiss(0),
        "lucidrains ResidualVQ": peer_rvq,
    }
    return makers[kind]()


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """One table a catalogue and shape: medians over seeds, the spread of error and recall beside them."""
    import faiss
    import torch

    lines = [
        "# Quality of every quantizer, beside its peers",
        "",
        f"`{' '.join(['python', *sys.argv])}`",
        "",
        f"{time.strftime('%Y-%m-%d')}; torch {torch.__version__}, faiss {faiss.__version__}, {cpu()}, "
        f"{os.cpu_count()} cores, {args.workers} worker(s) of {args.threads} threads, device {args.device}.",
        "Medians over the seeds, (lowest to highest) where given. Error: sum of squares over that of the "
        f"vectors. Recall: neighbour recall@10 of {QUERIES} items, both sides decoded, ties by chance. "
        "Collisions: above the share of items with an equal title. Used: fewest codes of a level. Purity: "
        "articleType of the first code; lift: items in a row of one user share the first code, over chance.",
    ]
    held = [row for row in rows if row.get("held_out")]
    rows = [row for row in rows if not row.get("held_out")]
    for name in CATALOGUES:
        for shape in SHAPES:
            ours = [row for row in rows if row["catalogue"] == name and row["levels"] == len(shape)]
            if ours:
                lines += ["", f"## {name}, {len(shape)} x {K}", "", *table(ours, args.seeds)]
    vae = [row for row in rows if row["kind"] == "RQ-VAE" and row["levels"] == 3]
    if len({row["seed"] for row in vae}) > args.seeds:
        lines += ["", "## RQ-VAE, every seed, 3 x 256", "", *collapse(vae)]
    if held:
        lines += ["", "## Items that were not fitted, 3 x 256", "", *unseen(held)]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]], seeds: int) -> list[str]:
    """Markdown rows in the order of KINDS."""
    meaning = "purity" if "purity_1" in rows[0] else "lift"
    lines = [
        "| quantizer | seeds | relative error | recall@10 | collisions | used | perplexity "
        f"| {meaning} | fit s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        ours = [row for row in rows if row["kind"] == kind and row["seed"] < seeds]
        if not ours:
            continue
        levels = [f"{median(level):.0f}" for level in zip(*(row["perplexity"] for row in ours), strict=True)]
        lines.append(
            f"| {kind} | {len(ours)} | {spread(ours, 'relative_error')} | {spread(ours, 'recall')} "
            f"| {median(row['collision_above_floor'] for row in ours):.4f} "
            f"| {min(min(row['used']) for row in ours)} | {' '.join(levels)} "
            f"| {median(row[f'{meaning}_1'] for row in ours):.3f} "
            f"| {median(row['fit_seconds'] for row in ours):.1f} |"
        )
    return lines


def unseen(rows: list[dict[str, Any]]) -> list[str]:
    """Relative error of the fitted nine tenths of the titles, and of the tenth left out."""
    lines = [
        "Fitted on nine tenths of the titles (one seed): relative error of those, and of the tenth left out.",
        "",
        "| quantizer | " + " | ".join(f"{name}: fitted | left out" for name in CATALOGUES) + " |",
        "|---" * (1 + 2 * len(CATALOGUES)) + "|",
    ]
    found = {(row["kind"], row["catalogue"]): row for row in rows}
    for kind in KINDS:
        ours = [found.get((kind, name)) for name in CATALOGUES]
        cells = [
            f"{row['error_fitted']:.4f} | {row['error_left_out']:.4f}" if row else "- | -" for row in ours
        ]
        lines += [f"| {kind} | " + " | ".join(cells) + " |"] if any(ours) else []
    return lines


def collapse(rows: list[dict[str, Any]]) -> list[str]:
    """Fewest codes and lowest perplexity of RQ-VAE over all seeds."""
    lines = [
        "Asked for in every seed: 231 of 256 codes in use and perplexity 128 at every level.",
        "",
        "| catalogue | seeds | fewest used by level | lowest perplexity by level | seeds that pass |",
        "|---|---|---|---|---|",
    ]
    for name in CATALOGUES:
        ours = [row for row in rows if row["catalogue"] == name]
        used = [min(level) for level in zip(*(row["used"] for row in ours), strict=True)]
        lowest = [f"{min(level):.0f}" for level in zip(*(row["perplexity"] for row in ours), strict=True)]
        passed = sum(min(row["used"]) >= 0.9 * K and min(row["perplexity"]) >= K / 2 for row in ours)
        lines.append(f"| {name} | {len(ours)} | {used} | {' '.join(lowest)} | {passed} |")
    return lines


def spread(rows: list[dict[str, Any]], name: str) -> str:
    """Median (lowest to highest)."""
    values = [row[name] for row in rows]
    return f"{median(values):.4f} ({min(values):.4f}-{max(values):.4f})"


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


if __name__ == "__main__":
    main()
