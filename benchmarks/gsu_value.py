"""Is top-K by multimodal cosine worth its cost? Against the most recent K and K at random, same model.

    python benchmarks/gsu_value.py --data DIR --cache DIR --out benchmarks/results/gsu_value.md

The histogram of the K cosines is the model's only input. A user's last 20 % of positives by time are held out
(whole baskets in the retail data); each positive has four negatives of like popularity; everything that a
candidate is compared with lies strictly before its own time.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import nn

from prerank_tools.gsu.frames import search_of
from prerank_tools.gsu.layers import SimTier
from prerank_tools.gsu.rank import cosines_at
from prerank_tools.gsu.search import Groups, TopK, topk
from prerank_tools.gsu.simtier import simtier
from prerank_tools.gsu.vector_frames import ItemVectors, read_vectors
from prerank_tools.metrics.ranking import auc, auc_per_group
from prerank_tools.tables.table import open_table

K, NEGATIVES, SEEDS, RESAMPLES = 50, 4, 3, 1000
DATA = ("ml-latest-small-mm", "online-retail-ii")


@dataclass(frozen=True)
class Rows:
    """Candidates with labels, users, and which are held out."""

    label_R: np.ndarray
    user_R: np.ndarray
    held_R: np.ndarray


def main() -> None:
    """Embed once, measure both data sets, write."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--data", type=Path, required=True)
    words.add_argument("--cache", type=Path, required=True)
    words.add_argument("--out", type=Path, required=True)
    given = words.parse_args()
    torch.set_num_threads(2)
    lines = ["# What top-K by cosine is worth", ""]
    lines += [f"`python benchmarks/gsu_value.py --data DIR --cache DIR`, torch {torch.__version__}, Python"]
    lines += [
        f"{platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}, {SEEDS} seeds. {__doc__.splitlines()[4]}"
    ]
    lines += __doc__.splitlines()[5:]
    for name in DATA:
        lines += measure(name, given.data / name, given.cache)
        given.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def measure(name: str, source: Path, cache: Path) -> list[str]:
    """One data set: the detectable effect first, then the four ways to choose K."""
    events, asked, rows = examples(source)
    vectors = read_vectors(open_table(embedded(name, source, cache), "item_embeddings"))[0]
    ways = {
        "top-K by cosine": "cosine", "most recent K": "recent", "K at random": "random",
        "top-K by cosine of shuffled vectors (control)": "shuffled",
    }  # fmt: skip
    scores = {way: scored(way, events, asked, vectors, rows) for way in ways.values()}
    held = rows.held_R
    label, user = rows.label_R[held], rows.user_R[held]
    draws = draws_of(user)
    gauc = {way: gauc_of(label, score[held], user) for way, score in scores.items()}
    spread = {way: np.array([gauc[way][1] @ d / (gauc[way][2] @ d) for d in draws]) for way in scores}
    difference = spread["cosine"] - spread["recent"]
    lines = ["", f"## {name}", ""]
    lines += [
        f"{held.sum():,} held-out candidates of {len(np.unique(user)):,} users, {label.sum():,} positives; "
    ]
    lines += [
        f"{(~held).sum():,} to train on. Detectable effect (2.8 standard errors of the paired difference of"
    ]
    lines += [f"cosine and recent over users): {2.8 * difference.std():.4f} GAUC.", ""]
    lines += [
        "| behaviours chosen | GAUC | 95 % of users | AUC | minus most recent | 95 % |",
        "|---|---|---|---|---|---|",
    ]
    for told, way in ways.items():
        low, high = np.percentile(spread[way], [2.5, 97.5])
        gap = spread[way] - spread["recent"]
        below, above = np.percentile(gap, [2.5, 97.5])
        lines.append(
            f"| {told} | {gauc[way][0]:.4f} | {low:.4f} .. {high:.4f} | "
            f"{auc(label, scores[way][held]):.4f} | "
            f"{gauc[way][0] - gauc['recent'][0]:+.4f} | {below:+.4f} .. {above:+.4f} |"
        )
        print(lines[-1], flush=True)
    return lines


def examples(source: Path) -> tuple[pl.DataFrame, pl.DataFrame, Rows]:
    """The log, and candidates: a user's positives after the first ten, with negatives of like popularity.

    Positives are ratings of 4 and more, or purchases (an item once a basket).
    """
    log = pl.read_parquet(source / "interactions.parquet")
    if "rating" in log.columns:
        log = log.filter(pl.col("rating") >= 4)
    log = log.select("user_id", "item_id", "timestamp").unique().sort("user_id", "timestamp", "item_id")
    rng = np.random.default_rng(0)
    popular = log["item_id"].value_counts(sort=True)
    place = {item: rank for rank, item in enumerate(popular["item_id"])}
    ordered = popular["item_id"].to_list()
    at = pl.int_range(pl.len()).over("user_id")
    baskets = log.with_columns(at.alias("at"), pl.len().over("user_id").alias("of")).filter(
        pl.col("of") >= 20
    )
    # A basket is held out whole: by where its first item stands.
    first = pl.col("at").min().over("user_id", "timestamp")
    positives = baskets.with_columns((first >= 0.8 * pl.col("of")).alias("held"), first.alias("first"))
    positives = positives.filter(pl.col("first") >= 10)
    positives = positives.sample(min(len(positives), 30_000), seed=0, shuffle=True).sort(
        "user_id", "timestamp", "item_id"
    )
    near = np.clip(
        np.array([place[item] for item in positives["item_id"]])[:, None]
        + rng.choice([-1, 1], (len(positives), NEGATIVES)) * rng.integers(1, 40, (len(positives), NEGATIVES)),
        0, len(ordered) - 1,
    )  # fmt: skip
    negatives = [[ordered[i] for i in row] for row in near]
    number = pl.Series("request_id", np.arange(len(positives)))
    base = positives.select("user_id", "timestamp", "held").with_columns(number)
    taken = (
        pl.concat(
            [
                base.with_columns(positives["item_id"], pl.lit(1).alias("label")),
                base.with_columns(pl.Series("item_id", negatives, dtype=pl.List(log["item_id"].dtype)))
                .explode("item_id")
                .with_columns(pl.lit(0).alias("label"))
                .select(*base.columns, "item_id", "label"),
            ]
        )
        .unique(["request_id", "item_id"], keep="first", maintain_order=True)
        .sort("request_id", "item_id")
    )
    user = taken["user_id"].rank("dense").to_numpy()
    rows = Rows(taken["label"].to_numpy(), user, taken["held"].to_numpy())
    return log, taken.select("request_id", "user_id", "timestamp", "item_id"), rows


def scored(
    way: str, events: pl.DataFrame, asked: pl.DataFrame, vectors: ItemVectors, rows: Rows
) -> np.ndarray:
    """Mean over seeds of the small model's logits, trained on what is not held out."""
    if way == "shuffled":
        order = np.random.default_rng(1).permutation(len(vectors.table_VD))
        vectors = ItemVectors(vectors.keys_V, vectors.rows_V, vectors.table_VD[order], vectors.seed)
    search = search_of(asked, events)
    table, row_U = vectors.gather(search.items)
    groups = search.with_rows(row_U)
    found = search.in_asked_order(chosen(way, table, groups))
    counts = torch.from_numpy(simtier(found.sims_MK)).float()
    return np.mean([fit(counts, rows, seed) for seed in range(SEEDS)], axis=0)


def chosen(way: str, table: np.ndarray, groups: Groups) -> TopK:
    """K behaviours of each candidate by one of the ways; cosines are exact in all of them."""
    if way in ("cosine", "shuffled"):
        return topk(table, groups, k=K, recent=0)
    visible = groups.visible_M
    if way == "recent":
        positions = visible[:, None] - 1 - np.arange(K)
    else:
        rng = np.random.default_rng(2)
        # The same K for all candidates of a request would tell nothing apart from recency: draw for each.
        keys = rng.random((len(visible), K))
        positions = np.floor(keys * np.maximum(visible, 1)[:, None]).astype(np.int64)
    positions = np.where((positions >= 0) & (positions < visible[:, None]), positions, -1).astype(np.int32)
    sims, recent = cosines_at(table, groups, positions, recent=0)
    return TopK(positions, sims, np.minimum(visible, K).astype(np.int32), recent)


def fit(counts_RN: torch.Tensor, rows: Rows, seed: int) -> np.ndarray:
    """SimTier and one hidden layer on the histogram; logits of every row."""
    torch.manual_seed(seed)
    model = nn.Sequential(SimTier(), nn.Linear(22, 32), nn.ReLU(), nn.Linear(32, 1))
    best = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    label = torch.from_numpy(rows.label_R).float()
    train = torch.from_numpy(np.flatnonzero(~rows.held_R))
    for _ in range(3):
        for batch in train[torch.randperm(len(train))].split(2048):
            loss = nn.functional.binary_cross_entropy_with_logits(model(counts_RN[batch])[:, 0], label[batch])
            best.zero_grad()
            loss.backward()
            best.step()
    with torch.no_grad():
        return model(counts_RN)[:, 0].numpy()


def gauc_of(label: np.ndarray, score: np.ndarray, user: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """GAUC, and what each user adds to its numerator and denominator."""
    auc_U, rows_U = auc_per_group(label, score, user)
    usable = ~np.isnan(auc_U)
    above, below = np.where(usable, auc_U * rows_U, 0.0), np.where(usable, rows_U, 0)
    return float(above.sum() / below.sum()), above, below


def draws_of(user: np.ndarray) -> list[np.ndarray]:
    """How often each user comes in each resample."""
    users = len(np.unique(user))
    rng = np.random.default_rng(0)
    return [np.bincount(rng.integers(0, users, users), minlength=users) for _ in range(RESAMPLES)]


def embedded(name: str, source: Path, cache: Path) -> Path:
    """Text (and posters) through `prerank embed items`, once."""
    out = cache / name
    if (out / "manifest.json").exists():
        return out
    cache.mkdir(parents=True, exist_ok=True)
    items = pl.read_parquet(source / "items.parquet").with_columns(pl.col("title").fill_null(""))
    words = [str(Path(sys.executable).with_name("prerank")), "embed", "items", str(cache / f"{name}.parquet")]
    words += ["--model", "minilm", "-o", str(out)]
    if "overview" in items.columns:
        genres, overview = pl.col("genres").list.join(" "), pl.col("overview").fill_null("")
        items = items.with_columns(pl.concat_str("title", genres, overview, separator=". ").alias("title"))
        posters = pl.read_parquet(source / "posters_96px_min5.parquet").select("item_id", image="jpeg")
        items = items.join(posters, on="item_id", how="left")
        words += ["--image-model", "efficientnet-lite0"]
    kept = [column for column in ("item_id", "title", "image") if column in items.columns]
    items.select(kept).write_parquet(cache / f"{name}.parquet")
    subprocess.run(words, check=True)
    return out


if __name__ == "__main__":
    main()
