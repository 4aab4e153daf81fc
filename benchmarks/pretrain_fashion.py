"""Does SCL climb its ladder on picture <-> title pairs, and does the fused vector beat either half?

    python benchmarks/pretrain_fashion.py --data DIR --cache features.safetensors --out FILE

DIR holds `items.parquet` (item_id, title, articleType) and `images_96px_5k.parquet` (item_id, jpeg). The
towers are frozen (MiniLM, EfficientNet-Lite0) and only fusions learn: each content is encoded once.
Runs that are done are kept beside the cache: the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from pretrain_data import frozen_features
from pretrain_fashion_page import NAMES, NEEDED, finished, page
from pretrain_fold import TUNING, Fold, read_items, texts_of
from pretrain_simple import expected_picture, halves, linear_map, weighted

from prerank_tools.encoders.fusion import FusionConfig, Kind, build_fusion
from prerank_tools.encoders.moco import SclConfig
from prerank_tools.encoders.neighbours import NeighbourConfig
from prerank_tools.encoders.pair_batches import FeatureEncoder
from prerank_tools.encoders.pretrain import EncoderTraining, Split, TrainEncoderConfig, pretrain

SCL = {"momentum": 0.99}
LADDER: dict[str, dict[str, Any]] = {
    "in-batch only": {"bank": 0, "triplet_weight": 0.0},
    "+ bank": {**SCL, "triplet_weight": 0.0},
    "+ bank + triplet (mined)": {**SCL, "triplet_weight": 0.5},
}
BATCHES = {128: (20, 1e-3), 32: (15, 5e-4)}  # batch size -> epochs, learning rate


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
    parser.add_argument(
        "--tune", action="store_true", help="seeds on the groups of no reported test; no page"
    )
    parser.add_argument("--runs", type=int, help="stop after this many runs; the next call goes on")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    items = read_items(words.data)
    features = frozen_features(words.cache, texts_of(items), items["image"].to_list(), threads=words.threads)
    kept = words.cache.with_suffix(".runs.json")
    runs: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    seeds = range(TUNING, TUNING + words.seeds) if words.tune else range(words.seeds)
    missing = [(name, seed) for name in NAMES for seed in seeds if f"{name}|{seed}" not in runs]
    for name, seed in missing[: words.runs]:
        runs[f"{name}|{seed}"] = job(items, features, name, seed)
        kept.write_text(json.dumps(runs))
        print(name, seed, runs[f"{name}|{seed}"], flush=True)
    if not words.tune and finished(runs, words.seeds).issuperset(NEEDED):
        words.out.write_text(page(runs, words.seeds, len(items), words.threads))
    if left := len(missing) - len(missing[: words.runs]):
        sys.exit(f"{left} runs left: call again")


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
    if name.startswith("expected"):
        return expected_picture(fold)
    step, size = name.split(" @") if "@" in name else ("+ bank" if name == "bare" else "whole", "128")
    whole = step.startswith("whole")
    return trained(fold, LADDER["+ bank" if whole else step], int(size), whole=whole)


def fresh(seed: int, kind: Kind = "concat") -> FeatureEncoder:
    """An untrained fusion over frozen features."""
    torch.manual_seed(seed)
    return FeatureEncoder(build_fusion(FusionConfig(kind=kind, text_dim=384, image_dim=1280)), 0.2)


def trained(fold: Fold, scl: dict[str, Any], size: int, *, whole: bool = False) -> dict[str, float]:
    """SCL on the fold's training pairs: last weights, nothing tuned on the test groups.

    `whole` is what `train encoder` does by default with such pairs: a residual fusion, and whole items
    held to their neighbours, some with words left out.
    """
    epochs, lr = BATCHES[size]
    training = EncoderTraining(epochs=epochs, batch_size=size, lr=lr, seed=fold.seed, patience=0)
    neighbours = NeighbourConfig(weight=1.0 if whole else 0.0)
    config = TrainEncoderConfig(scl=SclConfig(**scl), training=training, neighbours=neighbours)
    encoder = fresh(fold.seed, "residual" if whole else "concat")
    contents = fold.shown(fold.text_ND, short=whole)
    split = Split(fold.pairs.take(fold.fit), fold.pairs.take(np.array([], dtype=np.int64)))
    with tempfile.TemporaryDirectory() as folder:
        pretrain(encoder, contents, split=split, config=config, folder=Path(folder))
    return fold.measure(encoder)


if __name__ == "__main__":
    main()
