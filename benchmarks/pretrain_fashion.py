"""Does SCL climb its ladder on picture <-> title pairs, and does the fused vector beat either half?

    python benchmarks/pretrain_fashion.py --data DIR --cache features.safetensors --out FILE

DIR holds `items.parquet` (item_id, title, articleType) and `images_96px_5k.parquet` (item_id, jpeg). The
towers are frozen (MiniLM, EfficientNet-Lite0) and only fusions learn: each content is encoded once.
Runs that are done are kept beside the cache: the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from pretrain_data import frozen_features, interval, machine
from torch.nn.functional import normalize

from prerank_tools.encoders.fusion import FusionConfig, build_fusion, concat_unit
from prerank_tools.encoders.moco import SclConfig
from prerank_tools.encoders.pair_batches import FeatureContents, FeatureEncoder, PairRows, retrieval
from prerank_tools.encoders.pretrain import EncoderTraining, Split, TrainEncoderConfig, pretrain

CANDIDATES = 500
WEIGHTS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
LAMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0)
METRICS = ("acc@1", "acc@5", "recall@10")
SCL = {"momentum": 0.99}
LADDER: dict[str, dict[str, Any]] = {
    "in-batch only": {"bank": 0, "triplet_weight": 0.0},
    "+ bank": {**SCL, "triplet_weight": 0.0},
    "+ bank + triplet (mined)": {**SCL, "triplet_weight": 0.5},
}
BATCHES = {128: (20, 1e-3), 32: (15, 5e-4)}  # batch size -> epochs, learning rate
SIMPLE = ("frozen", "linear map", "halves", "halves bare", "weighted", "weighted bare")
STEPS = [f"{name} @128" for name in LADDER] + [f"{name} @32" for name in list(LADDER)[:2]]
NEEDED = (*SIMPLE, *STEPS[:2], "bare")
NAMES = (*NEEDED, *STEPS[2:])


def main() -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, help="stop after this many runs; the next call goes on")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    items = read_items(words.data)
    texts = {name: items[name].to_list() for name in ("title", "bare")}
    features = frozen_features(words.cache, texts, items["image"].to_list(), threads=words.threads)
    kept = words.cache.with_suffix(".runs.json")
    runs: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    missing = [(name, seed) for name in NAMES for seed in range(words.seeds) if f"{name}|{seed}" not in runs]
    for name, seed in missing[: words.runs]:
        runs[f"{name}|{seed}"] = job(items, features, name, seed)
        kept.write_text(json.dumps(runs))
        print(name, seed, runs[f"{name}|{seed}"], flush=True)
    if finished(runs, words.seeds).issuperset(NEEDED):
        words.out.write_text(page(runs, words.seeds, len(items), words.threads))
    if left := len(missing) - len(missing[: words.runs]):
        sys.exit(f"{left} runs left: call again")


def read_items(data: Path) -> pl.DataFrame:
    """Illustrated items by id; `bare` is the title without the words of its type (singular and plural)."""
    items = pl.read_parquet(data / "items.parquet").join(
        pl.read_parquet(data / "images_96px_5k.parquet").select("item_id", image="jpeg"), on="item_id"
    )
    items = items.sort("item_id").with_columns(pl.col("item_id").cast(pl.Int64))
    pairs = zip(items["title"].to_list(), items["articleType"].to_list(), strict=True)
    return items.with_columns(bare=pl.Series([without_type(title, kind) for title, kind in pairs]))


def without_type(title: str, kind: str) -> str:
    """The title less every word of the type, whatever its number."""
    stems = {stem(word) for word in re.findall(r"[a-z]+", kind.lower())}
    kept = [word for word in title.split() if stem(re.sub(r"[^a-z]", "", word.lower())) not in stems]
    return " ".join(kept) or "item"


def stem(word: str) -> str:
    """A word without its plural ending."""
    return re.sub(r"(es|s)$", "", word)


class Fold:
    """One seed: 500 title groups held out, one item of each a candidate; the others are for training."""

    def __init__(self, items: pl.DataFrame, features: Mapping[str, np.ndarray], seed: int, text: str) -> None:
        group_N = codes(items["title"].str.to_lowercase())
        held = np.random.default_rng(seed).permutation(np.unique(group_N))[:CANDIDATES]
        self.unseen = np.flatnonzero(np.isin(group_N, held))
        _, first = np.unique(group_N[self.unseen], return_index=True)
        self.test, self.fit = self.unseen[np.sort(first)], np.flatnonzero(~np.isin(group_N, held))
        self.text_ND, self.image_ND = (torch.from_numpy(features[name]) for name in (text, "image"))
        self.type_N = codes(items["articleType"])
        count, self.seed = len(items), seed
        # Contents: the items (0 .. N, both modalities), then their titles alone as queries (N .. 2N).
        self.pairs = PairRows(
            query_P=np.arange(count, 2 * count),
            item_P=np.arange(count),
            item_text_P=np.zeros(count, dtype=bool),
            item_id_C=np.r_[np.arange(count), np.full(count, -1)],
            group_C=np.r_[group_N, np.full(count, -1)],
            category_C=np.r_[self.type_N, np.full(count, -1)],
        )
        there = torch.ones(2 * count, dtype=torch.bool)
        self.contents = FeatureContents(
            self.text_ND.repeat(2, 1),
            torch.cat([self.image_ND, torch.zeros_like(self.image_ND)]),
            there,
            there & (torch.arange(2 * count) < count),
        )

    @torch.no_grad()
    def measure(self, encoder: FeatureEncoder) -> dict[str, float]:
        """Both directions among the 500, and neighbours of the same type among the unseen items."""
        encoder.eval()
        nothing = np.zeros(len(self.test), dtype=bool)
        image = encoder(self.contents.inputs(self.test, nothing))
        title = encoder(self.contents.inputs(self.test + len(self.text_ND)))
        hidden = np.zeros(len(self.unseen), dtype=bool)
        by_part = {
            "knn": self.contents.inputs(self.unseen),
            "knn text": self.contents.inputs(self.unseen + len(self.text_ND)),
            "knn image": self.contents.inputs(self.unseen, hidden),
        }
        found = {f"i2t {name}": value for name, value in retrieval(image, title).items()}
        found |= {f"t2i {name}": value for name, value in retrieval(title, image).items()}
        return found | {name: self.same_type(encoder(inputs)) for name, inputs in by_part.items()}

    def same_type(self, x_ND: torch.Tensor, rows: np.ndarray | None = None) -> float:
        """Mean share of the same article type among the 10 nearest of each unseen item (or of `rows`)."""
        kind = torch.from_numpy(self.type_N[self.unseen if rows is None else rows])
        cosine = x_ND @ x_ND.T
        cosine.fill_diagonal_(-2)
        return float((kind[cosine.topk(10).indices] == kind[:, None]).float().mean())


def codes(values: pl.Series) -> np.ndarray:
    """Equal values, equal numbers."""
    return values.rank("dense").cast(pl.Int64).to_numpy()


def job(items: pl.DataFrame, features: Mapping[str, np.ndarray], name: str, seed: int) -> dict[str, float]:
    """One run by its name."""
    fold = Fold(items, features, seed, "bare" if "bare" in name else "title")
    if name == "frozen":
        return fold.measure(fresh(seed))
    if name == "linear map":
        return linear_map(fold)
    if name.startswith("halves"):
        return halves(fold)
    if name.startswith("weighted"):
        return weighted(fold)
    step, size = name.split(" @") if "@" in name else ("+ bank", "128")
    return trained(fold, LADDER[step], int(size))


def fresh(seed: int) -> FeatureEncoder:
    """An untrained fusion over frozen features."""
    torch.manual_seed(seed)
    return FeatureEncoder(build_fusion(FusionConfig(text_dim=384, image_dim=1280)), 0.2)


def trained(fold: Fold, scl: dict[str, Any], size: int) -> dict[str, float]:
    """SCL on the fold's training pairs: last weights, nothing tuned on the test groups."""
    epochs, lr = BATCHES[size]
    training = EncoderTraining(epochs=epochs, batch_size=size, lr=lr, seed=fold.seed, patience=0)
    config = TrainEncoderConfig(scl=SclConfig(**scl), training=training)
    encoder = fresh(fold.seed)
    split = Split(fold.pairs.take(fold.fit), fold.pairs.take(np.array([], dtype=np.int64)))
    with tempfile.TemporaryDirectory() as folder:
        pretrain(encoder, fold.contents, split=split, config=config, folder=Path(folder))
    return fold.measure(encoder)


def linear_map(fold: Fold) -> dict[str, float]:
    """Ridge regression from centred picture to title features; lambda chosen inside the training groups."""
    image, text = (normalize(x, dim=1).double() for x in (fold.image_ND, fold.text_ND))
    order = np.random.default_rng(fold.seed + 1000).permutation(fold.fit)
    inner_fit, inner = order[CANDIDATES:], order[:CANDIDATES]

    def score(fit: np.ndarray, test: np.ndarray, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        mean_image, mean_text = image[fit].mean(0), text[fit].mean(0)
        x, y = image[fit] - mean_image, text[fit] - mean_text
        solved = torch.linalg.solve(x.T @ x + weight * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
        return normalize((image[test] - mean_image) @ solved, dim=1), normalize(text[test] - mean_text, dim=1)

    best = max(LAMBDAS, key=lambda weight: retrieval(*score(inner_fit, inner, weight))["recall@10"])
    mapped, titles = score(fold.fit, fold.test, best)
    found = {f"i2t {name}": value for name, value in retrieval(mapped, titles).items()}
    return (
        found | {f"t2i {name}": value for name, value in retrieval(titles, mapped).items()} | {"lambda": best}
    )


def halves(fold: Fold) -> dict[str, float]:
    """Neighbours by frozen titles, by frozen pictures, and by both concatenated."""
    text, image = (normalize(x[fold.unseen], dim=1) for x in (fold.text_ND, fold.image_ND))
    there = torch.ones(len(text), dtype=torch.bool)
    vectors = {"text": text, "image": image, "concat": concat_unit(text, image, there, there)}
    return {name: fold.same_type(x) for name, x in vectors.items()}


def weighted(fold: Fold) -> dict[str, float]:
    """Frozen concatenation with the text at a weight that is best on as many items of the training groups."""

    def vectors(rows: np.ndarray, weight: float) -> torch.Tensor:
        text, image = (normalize(x[rows], dim=1) for x in (fold.text_ND, fold.image_ND))
        return normalize(torch.cat([weight * text, image], dim=1), dim=1)

    sample = np.random.default_rng(fold.seed).choice(fold.fit, len(fold.unseen), replace=False)
    best = max(WEIGHTS, key=lambda weight: fold.same_type(vectors(sample, weight), sample))
    return {"knn": fold.same_type(vectors(fold.unseen, best)), "weight": best}


def finished(runs: Mapping[str, Any], seeds: int) -> set[str]:
    """Names that were run with every seed."""
    return {name for name in NAMES if all(f"{name}|{seed}" in runs for seed in range(seeds))}


def page(runs: Mapping[str, Any], seeds: int, items: int, threads: int) -> str:
    """The results as Markdown."""

    def of(name: str, key: str) -> list[float]:
        return [runs[f"{name}|{seed}"][key] for seed in range(seeds)]

    def line(name: str) -> str:
        cells = [interval(of(name, f"{way} {metric}")) for way in ("i2t", "t2i") for metric in METRICS]
        return f"| {name} | {' | '.join(cells)} |"

    def gain(one: str, other: str, key: str) -> str:
        return interval(list(np.subtract(of(one, key), of(other, key))))

    done = finished(runs, seeds)
    rows = [name for name in ("frozen", "linear map", *STEPS) if name in done]
    steps = []
    ladder = [(STEPS[0], "linear map"), (STEPS[1], STEPS[0]), (STEPS[2], STEPS[1]), (STEPS[4], STEPS[3])]
    for one, other in (step for step in ladder if done.issuperset(step)):
        cells = [gain(one, other, f"{way} {metric}") for way in ("i2t", "t2i") for metric in METRICS]
        steps.append(f"| {one} - {other} | {' | '.join(cells)} |")
    kinds = [
        f"| {label} | {' | '.join(interval(of(name, key)) for name in ('halves', 'halves bare'))} |"
        for label, key in (
            ("MiniLM title, frozen", "text"),
            ("EfficientNet-Lite0 picture, frozen", "image"),
            ("both, frozen, concatenated", "concat"),
        )
    ]
    cells = [interval(of(name, "knn")) for name in ("weighted", "weighted bare")]
    kinds.append(f"| both, frozen, text weighted | {' | '.join(cells)} |")
    learnt = ("+ bank @128", "bare")
    kinds += [
        f"| {label} | {' | '.join(interval(of(name, key)) for name in learnt)} |"
        for label, key in (
            ("title through the SCL fusion", "knn text"),
            ("picture through the SCL fusion", "knn image"),
            ("both through the SCL fusion", "knn"),
        )
    ]
    rivals = {
        "best single modality of the four": [
            np.max([of(one, "text"), of(one, "image"), of(two, "knn text"), of(two, "knn image")], axis=0)
            for one, two in zip(("halves", "halves bare"), learnt, strict=True)
        ],
        "frozen concatenation": [np.array(of(name, "concat")) for name in ("halves", "halves bare")],
    }
    frozen = [np.maximum(of(name, "text"), of(name, "image")) for name in ("halves", "halves bare")]
    gains = [of(name, "knn") - one for name, one in zip(("weighted", "weighted bare"), frozen, strict=True)]
    cells = [interval(list(g)) for g in gains]
    kinds.append(f"| both, frozen, text weighted - better frozen half | {' | '.join(cells)} |")
    for label, rival in rivals.items():
        gains = [np.array(of(name, "knn")) - other for name, other in zip(learnt, rival, strict=True)]
        kinds.append(f"| both, SCL - {label} | {' | '.join(interval(list(g)) for g in gains)} |")
    columns = [f"{way} {metric}" for way in ("i2t", "t2i") for metric in ("Acc@1", "Acc@5", "R@10")]
    head = f"| | {' | '.join(columns)} |\n{'|---' * 7}|"
    return "\n".join(
        [
            "# SCL on fashion: picture <-> title, and neighbours of the same type",
            "",
            f"`python benchmarks/pretrain_fashion.py --data DIR --cache F --out FILE --seeds {seeds}`",
            "",
            f"{machine(threads)}. Other work shared the cores; no timing is claimed here.",
            "",
            f"{items} illustrated items, split by title group: 500 groups held out (one item of each is",
            f"a candidate), {seeds} seeds (each its own split, initial weights and batch order). Towers",
            "frozen; a concat fusion of 128 dims learns. Mean ± half width of the 95 % t-interval over",
            "seeds; differences are paired by seed. `@32`, `@128`: batch size. i2t ranks the 500 titles for",
            "a picture, t2i the 500 pictures for a title. `frozen` is the untrained fusion: two unrelated",
            "spaces, hence chance.",
            "",
            head,
            *map(line, rows),
            "",
            "Step by step, paired:",
            "",
            head,
            *steps,
            "",
            "kNN@10 of the article type among the items of held-out groups (unseen in pre-training):",
            "",
            "| | titles | titles without the type's words |\n|---|---|---|",
            *kinds,
            "",
        ]
    )


if __name__ == "__main__":
    main()
