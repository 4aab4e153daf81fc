"""Three-tower scoring: the split first layer with the item cache against the network as it is drawn.

    python benchmarks/scorer.py --out benchmarks/results/scorer.md

Both give the same probabilities; checked before anything is timed. Weights and inputs are random.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from prerank_tools.run.manifest import cpu_model
from prerank_tools.scorers.serving import CachedScorer
from prerank_tools.scorers.three_tower import InputShape, ThreeTower, ThreeTowerConfig

REQUESTS, CANDIDATES, ITEMS, CONTENT, CROSS = 32, 3_000, 50_000, 256, 59
SIZES = {
    "default": ThreeTowerConfig(),
    "course": ThreeTowerConfig(
        user_hidden=(1024, 512, 256),
        user_width=128,
        item_hidden=(512, 256),
        item_width=64,
        cross_width=32,
        match_width=32,
        upper=(256, 128, 64),
    ),
}
HEAD = """# Three-tower scoring on a CPU

`{command}`, {date}. {cpu},
{threads} thread(s), Python {python}, torch {torch}, seed 0, median of {repeats} alternated runs.

{requests} requests x {candidates} candidates out of {items} items, content {content}-d,
{cross} cross features, three SID levels, random weights.
*Drawn*: every tower's output concatenated for every candidate, the item tower run for every candidate.
*Cold*: split first layer, cache empty. *Warm*: the cache holds every item.
Probabilities agree within {difference:.1e}.

| sizes | multiply-adds user / item / candidate | drawn, candidates/s | cold | warm | warm / drawn |
|---|---|---|---|---|---|
"""
READING = """
Reading it: the gain is what the item tower and the wide part of the first layer cost when they run for every
candidate. It shrinks where the upper layers dominate (`course`): neither the split nor a cache helps them.
Cold is one pass over {requests} requests that meet most items for the first time. Features (search, counts)
are not in these numbers. Other work shared the cores: trust the ratios.
"""


def main() -> None:
    """Time all sizes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, worst = [], 0.0
    for name, config in SIZES.items():
        row, difference = measure(name, config, options.repeats)
        rows.append(row)
        worst = max(worst, difference)
    command = f"python benchmarks/scorer.py --threads {options.threads} --out benchmarks/results/scorer.md"
    head = HEAD.format(
        command=command,
        date=datetime.now(UTC).date(),
        cpu=cpu_model(),
        threads=options.threads,
        python=platform.python_version(),
        torch=torch.__version__,
        repeats=options.repeats,
        requests=REQUESTS,
        candidates=f"{CANDIDATES:,}",
        items=f"{ITEMS:,}",
        content=CONTENT,
        cross=CROSS,
        difference=worst,
    )
    text = head + "\n".join(rows) + "\n" + READING.format(requests=REQUESTS)
    print(text)
    if options.out:
        options.out.write_text(text)


def measure(name: str, config: ThreeTowerConfig, repeats: int) -> tuple[str, float]:
    """One row of the table, and how far the two forms are apart."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    shape = InputShape(
        user_blocks={"context": 5, "history": CONTENT, "vector": 64, "has_vector": 1},
        item_blocks={"content": CONTENT, "has_vector": 1},
        cross_blocks={"all": CROSS},
        code_sizes={"level_0": 256, "level_1": 256, "level_2": 256},
        tasks=("click",),
    )
    model = ThreeTower(shape, config).eval()
    item_NF, codes_NC = torch.randn(ITEMS, CONTENT + 1), torch.randint(0, 256, (ITEMS, 3))
    request_n = torch.arange(REQUESTS).repeat_interleave(CANDIDATES)
    items_n = rng.integers(0, ITEMS, len(request_n))
    user_BF, cross_nF = torch.randn(REQUESTS, CONTENT + 70), torch.randn(len(request_n), CROSS)
    scorer = CachedScorer(model, item_NF, codes_NC, features="1")

    def split() -> np.ndarray:
        return scorer.probabilities(user_BF, request_n, items_n, cross_nF)

    def drawn() -> np.ndarray:
        rows_n = torch.from_numpy(items_n)
        return as_drawn(model, user_BF, request_n, item_NF[rows_n], codes_NC[rows_n], cross_nF)

    started = time.perf_counter()
    split()
    cold = time.perf_counter() - started
    difference = float(np.abs(split() - drawn()).max())
    times: dict[str, list[float]] = {"warm": [], "drawn": []}
    for _ in range(repeats):
        for form, run in (("warm", split), ("drawn", drawn)):
            started = time.perf_counter()
            run()
            times[form].append(time.perf_counter() - started)
    warm, whole = (statistics.median(times[form]) for form in ("warm", "drawn"))
    costs = " / ".join(f"{cost:,}" for cost in model.multiply_adds().values())
    per_second = [f"{len(request_n) / seconds:,.0f}" for seconds in (whole, cold, warm)]
    return f"| {name} | {costs} | {' | '.join(per_second)} | {whole / warm:.1f} x |", difference


@torch.inference_mode()
def as_drawn(
    model: ThreeTower,
    user_BF: torch.Tensor,
    request_n: torch.Tensor,
    item_nF: torch.Tensor,
    codes_nC: torch.Tensor,
    cross_nF: torch.Tensor,
) -> np.ndarray:
    """The user tower once a request, everything else for every candidate, on the concatenation."""
    z_u = model.user_tower(model.user_scale(user_BF))[request_n]
    z_i = model.item_tower(torch.cat([model.item_scale(item_nF), model.codes(codes_nC)], dim=1))
    z_c = model.cross_tower(model.cross_scale(cross_nF))
    match = model.user_match(z_u) * model.item_match(z_i)
    h0 = torch.cat([z_u, z_i, z_c, match, match.sum(1, keepdim=True)], dim=1)
    return torch.sigmoid(model.heads(model.upper(model.first(h0))).double()).numpy()


if __name__ == "__main__":
    main()
