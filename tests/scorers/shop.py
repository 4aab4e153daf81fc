"""A small shop on disk: items with Chinese categories, a log, labelled requests, item and user vectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prerank_tools.run.job import RunOptions, run
from prerank_tools.scorers.input_frames import InputPaths
from prerank_tools.scorers.score_stage import Score
from prerank_tools.scorers.train_stage import ScorerTraining, TrainScorer, TrainScorerConfig

DAY = 86_400
CUT = 40 * DAY
ITEMS, USERS, WIDTH = 24, 12, 6
ONE = RunOptions(workers=1, threads=1)
QUICK = TrainScorerConfig(training=ScorerTraining(epochs=2, batch_size=16))


def write_shop(folder: Path, *, strings: bool = False, flat: bool = False, seed: int = 0) -> InputPaths:
    """Users like one of three categories; requests before and after `CUT` offer eight items each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    group_I, group_U = np.arange(ITEMS) % 3, np.arange(USERS) % 3
    users = rng.integers(0, USERS, 400)
    items = np.where(rng.random(400) < 0.8, rng.integers(0, ITEMS // 3, 400) * 3 + group_U[users], 0)
    times = rng.integers(DAY, 60 * DAY, 400)
    events = pl.DataFrame({"user_id": users, "item_id": items, "timestamp": times})
    asked = rng.integers(0, USERS, 90)
    offered = np.stack([rng.permutation(ITEMS)[:8] for _ in asked])
    liked = (group_I[offered] == group_U[asked][:, None]) & (rng.random(offered.shape) < 0.9)
    requests = pl.DataFrame(
        {
            "request_id": np.arange(90),
            "user_id": asked,
            "timestamp": np.sort(rng.integers(10 * DAY, 60 * DAY, 90)),
            "candidates": offered.tolist(),
            "label_click": liked.astype(int).tolist(),
        }
    )
    content = (
        rng.normal(size=(ITEMS, WIDTH)).astype(np.float32) + 3 * np.eye(3, WIDTH, dtype=np.float32)[group_I]
    )
    words = np.array(["茶杯", "雨伞", "lamp"])[group_I]
    catalogue = pl.DataFrame(
        {"item_id": np.arange(ITEMS), "category": words, "price": np.arange(ITEMS) + 0.5}
    )
    vectors = pl.DataFrame({"item_id": np.arange(ITEMS)}).with_columns(pl.Series("embedding", content))
    as_of = np.tile(np.arange(0, 60, 5) * DAY, USERS)
    taste = np.repeat(np.eye(3, 4, dtype=np.float32)[group_U], 12, axis=0) + 0.1
    user_vectors = pl.DataFrame({"user_id": np.repeat(np.arange(USERS), 12), "as_of": as_of})
    user_vectors = user_vectors.with_columns(pl.Series("embedding", taste))
    tables = {"e": events, "r": requests, "i": catalogue, "emb": vectors, "users": user_vectors}
    for name, frame in tables.items():
        frame = with_string_ids(frame) if strings else frame
        if name == "r" and flat:
            frame = frame.explode("candidates", "label_click").rename({"candidates": "item_id"})
        frame.write_parquet(folder / f"{name}.parquet")
    at = {name: folder / f"{name}.parquet" for name in tables}
    return InputPaths(at["r"], at["e"], at["i"], at["emb"], users=at["users"])


def with_string_ids(frame: pl.DataFrame) -> pl.DataFrame:
    """Ids that sort as their numbers do."""
    named = [name for name in ("user_id", "item_id", "request_id") if name in frame.columns]
    frame = frame.with_columns(
        pl.format("x{}", pl.col(n).cast(pl.String).str.zfill(3)).alias(n) for n in named
    )
    if "candidates" not in frame.columns:
        return frame
    text = pl.element().cast(pl.String).str.zfill(3)
    return frame.with_columns(pl.col("candidates").list.eval(pl.format("x{}", text)))


def edit(path: Path, change: Any) -> None:
    """Rewrite a table through `change(frame)`."""
    change(pl.read_parquet(path)).write_parquet(path)


def trained(folder: Path, paths: InputPaths, *, name: str = "scorer", **options: Any) -> Path:
    """A scorer fitted on the requests before `CUT`."""
    stage = TrainScorer(paths, **{"until": CUT, "config": QUICK, **options})
    run(stage, folder / name, ONE)
    return folder / name


def scored(
    folder: Path, paths: InputPaths, model: Path, *, name: str = "s.parquet", **options: Any
) -> pl.DataFrame:
    """Scores of all requests after `CUT`."""
    late = folder / "late.parquet"
    pl.read_parquet(paths.requests).filter(pl.col("timestamp") >= CUT).write_parquet(late)
    run(Score(replace(paths, requests=late), model=model, **options), folder / name, ONE)
    out = folder / name
    return pl.read_parquet(out / "data" / "*.parquet" if out.is_dir() else out)
