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
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from quantizers_page import KINDS, QUERIES, SHAPES, K, report
from schedule import Task, next_task, times
from title_vectors import CATALOGUES, Catalogue, load

PAGE = Path(__file__).parent / "results" / "quantizers.md"  # tells how long a fit takes
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
    words.add_argument("--seconds", type=float, default=1e9, help="start nothing that would not end by then")
    args = words.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "quantizers.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    tasks = [task for task in wanted(args) if task not in {key_of(row) for row in rows}]
    # Spawned, so that every library of a worker starts with this many threads.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(args.threads))
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        run(tasks, rows, kept, pool, args)
    (args.out / "quantizers.md").write_text(report(rows, args))


def run(
    tasks: list[Task],
    rows: list[dict[str, Any]],
    kept: Path,
    pool: ProcessPoolExecutor,
    args: argparse.Namespace,
) -> None:
    """Start what can end in time, as workers come free; every row is written as soon as it is there."""
    ends = time.monotonic() + args.seconds
    running: dict[Future[dict[str, Any]], Task] = {}
    while True:
        expected = times(rows, PAGE)
        while len(running) < args.workers:
            task = next_task(tasks, expected, ends - time.monotonic())
            if task is None:
                break
            tasks.remove(task)
            running[pool.submit(measure, task, args)] = task
        if not running:
            break
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            task = running.pop(done)
            if done.exception() is not None:
                print(f"failed: {task}: {done.exception()!r}", file=sys.stderr)
                continue
            rows.append(done.result())
            with kept.open("a") as out:
                out.write(json.dumps(done.result()) + "\n")
    print(f"{len(rows)} rows, {len(tasks)} tasks left", file=sys.stderr)


def wanted(args: argparse.Namespace) -> list[Task]:
    """One seed of everything before the next, then RQ-VAE's further seeds, then the fits on nine tenths."""
    tasks = [
        Task(name, len(shape), kind, seed)
        for seed in range(args.seeds)
        for name in CATALOGUES
        for shape in SHAPES
        for kind in args.kinds
    ]
    more = range(args.seeds, args.rqvae_seeds)
    tasks += [Task(name, 3, "RQ-VAE", seed) for seed in more for name in CATALOGUES]
    held = [
        Task(name, 3, kind, 0, True) for name in CATALOGUES for kind in args.kinds if kind != "random hash"
    ]
    return tasks + held if args.held_out else tasks


def key_of(row: dict[str, Any]) -> Task:
    """What a row measured."""
    return Task(row["catalogue"], row["levels"], row["kind"], row["seed"], row["held_out"])


def measure(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Fit one quantizer and judge it on its whole catalogue.

    A held-out task fits on nine tenths of the titles instead and gives the error of both parts.
    """
    began = time.perf_counter()
    from prerank_tools.quantizers import assign as assignment

    assignment.SMALL_WORK = 10**15  # the plain float64 path: this script measures quality
    catalogue = load(task.catalogue, args.vectors)
    left_N = left_out(catalogue.title_N) if task.held_out else np.zeros(len(catalogue.x_ND), dtype=bool)
    fit_ND = catalogue.x_ND[~left_N]
    quantizer = make(task.kind, (K,) * task.levels, len(fit_ND))
    on_device = task.kind in ("RQ-VAE", "RQ-KMeans+", "RQ-KMeans + FSQ")
    start = time.perf_counter()
    quantizer.fit(fit_ND, seed=task.seed, threads=args.threads, device=args.device if on_device else "cpu")
    row = task._asdict() | {"fit_seconds": time.perf_counter() - start}
    if task.held_out:
        parts = {"error_fitted": fit_ND, "error_left_out": catalogue.x_ND[left_N]}
        row |= {part: relative_error(quantizer, x_ND, args.threads) for part, x_ND in parts.items()}
    else:
        codes_NL = np.asarray(quantizer.encode(catalogue.x_ND, threads=args.threads))
        row |= judged(quantizer, codes_NL, catalogue)
    return row | {"seconds": time.perf_counter() - began}


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
        return RKMeans(sizes=sizes, beam=beam, refine=REFINE_ROUNDS)

    def peer_faiss(beam: int) -> Any:
        from peers.faiss_rq import FaissQuantizer

        return FaissQuantizer(sizes, beam=beam)

    def peer_rvq() -> Any:
        from peers.vector_quantize_rvq import LucidrainsRVQ

        return LucidrainsRVQ(sizes, epochs=epochs(PEER_STEPS))

    makers: dict[str, Callable[[], Any]] = {
        "RQ-KMeans": lambda: RKMeans(sizes=sizes),
        "RQ-KMeans, random start": lambda: RKMeans(sizes=sizes, init="random"),
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


if __name__ == "__main__":
    main()
