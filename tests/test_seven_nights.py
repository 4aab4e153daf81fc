"""A week of live nights with late rows gives the tables that one backfill gives, down the whole chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prerank_tools.data.pair_stage import Pairs
from prerank_tools.data.request_stage import RequestKnobs, Requests
from prerank_tools.data.stage import Partition, Split
from prerank_tools.features.stage import Features
from prerank_tools.gsu.stage import GsuTopK
from prerank_tools.run.job import RunOptions, run
from prerank_tools.stage import Stage
from prerank_tools.tables.vectors import numpy_to_vectors
from prerank_tools.users.stage import EmbedUsers
from prerank_tools.users.train_stage import TrainUser, TrainUserConfig

DAY = 86_400
ONE = RunOptions(workers=1, threads=1, max_bad=1)
QUICK = TrainUserConfig.model_validate(
    {"max_events": 4, "model": {"width": 16}, "training": {"epochs": 1, "patience": 0}}
)
ITEMS, USERS, NIGHTS, LATE = 5, 6, 7, 3


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What was fitted before the week: item vectors, a user model, and requests at its end."""
    folder = tmp_path_factory.mktemp("before")
    x_ND = np.random.default_rng(0).standard_normal((ITEMS, 4)).astype(np.float32)
    vectors = pl.DataFrame({"item_id": range(ITEMS), "embedding": numpy_to_vectors("embedding", x_ND)})
    vectors.write_parquet(folder / "emb.parquet")
    log = [(user, item, item * DAY) for user in range(USERS) for item in range(ITEMS)]
    events = pl.DataFrame(log, schema=["user_id", "item_id", "timestamp"], orient="row")
    events.write_parquet(folder / "log.parquet")
    run(TrainUser(folder / "log.parquet", folder / "emb.parquet", config=QUICK), folder / "model", ONE)
    asked = [
        (f"r{u}{d}", u, (NIGHTS + d) * DAY + 5, list(range(ITEMS))) for u in range(USERS) for d in (0, 3)
    ]
    requests = pl.DataFrame(asked, schema=["request_id", "user_id", "timestamp", "candidates"], orient="row")
    requests.write_parquet(folder / "asked.parquet")
    return {"emb": folder / "emb.parquet", "model": folder / "model", "asked": folder / "asked.parquet"}


event = st.tuples(
    st.integers(0, USERS - 1),
    st.integers(0, ITEMS - 1),
    st.integers(0, NIGHTS * DAY - 1),
    st.integers(0, LATE),  # days until it is ingested
    st.integers(0, 2),
)


def log_of(events: list[tuple[int, ...]]) -> pl.DataFrame:
    log = pl.DataFrame(events, schema=["user_id", "item_id", "timestamp", "delay", "value"], orient="row")
    return log.with_columns(ingested_at=pl.col("timestamp") + pl.col("delay") * DAY).drop("delay")


def downstream(log: Path, before: dict[str, Path]) -> dict[str, Stage]:
    """Every stage that reads a log."""
    emb, asked = before["emb"], before["asked"]
    return {
        "split": Split(log, at=4 * DAY),
        "requests": Requests(log, start=2 * DAY, knobs=RequestKnobs(negatives_per_request=2)),
        "pairs": Pairs(("copurchase",), events=log, until=5 * DAY),
        "features": Features(log, asked),
        "gsu": GsuTopK(asked, log, emb),
        "users": EmbedUsers(log, emb, before["model"], as_of=(4 * DAY, (NIGHTS + LATE) * DAY)),
        "users as asked": EmbedUsers(log, emb, before["model"], requests=asked),
    }


def made(stage: Stage, out: Path) -> tuple[Any, ...] | None:
    """Digest, counts and quality of what a stage makes; None where it finds nothing to make."""
    from prerank_tools.errors import ContractError, UsageError

    try:
        manifest = run(stage, out, ONE).manifest
    except (ContractError, UsageError):
        return None
    assert manifest is not None
    return manifest.content_digest, manifest.counts, manifest.quality


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events=st.lists(event, min_size=8, max_size=60))
def test_seven_live_nights_with_late_rows_equal_one_backfill(
    before: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, events: list[tuple[int, ...]]
) -> None:
    folder, log = tmp_path_factory.mktemp("week"), log_of(events)
    log.write_parquet(folder / "all.parquet")
    backfill, live, users = folder / "backfill", None, None
    run(Partition(folder / "all.parquet", buckets=3), backfill, ONE)
    reused = 0
    for night in range(NIGHTS + LATE):
        day = log.filter(pl.col("ingested_at") // DAY == night)
        if day.is_empty():
            continue
        day.write_parquet(folder / f"{night}.parquet")
        stage = Partition(folder / f"{night}.parquet", buckets=3, append_to=live)
        run(stage, folder / f"night-{night}", ONE)
        live = folder / f"night-{night}"
        # The user table of the night, from that of the night before: only who has something new is computed.
        stage = EmbedUsers(
            live, before["emb"], before["model"], as_of=((NIGHTS + LATE) * DAY,), previous=users
        )
        manifest = run(stage, folder / f"users-{night}", ONE).manifest
        users = folder / f"users-{night}"
        assert manifest is not None
        touched = len(set(day["user_id"]))
        assert manifest.counts["computed"] <= touched  # late rows reopen their own users only
        reused += int(manifest.counts["reused"])
    assert live is not None and users is not None
    stages = downstream(backfill, before)
    for name, of_live in downstream(live, before).items():
        assert made(of_live, folder / f"{name}-live") == made(stages[name], folder / f"{name}-back"), name
    whole = EmbedUsers(backfill, before["emb"], before["model"], as_of=((NIGHTS + LATE) * DAY,))
    run(whole, folder / "users-whole", ONE)
    assert rows(users).equals(rows(folder / "users-whole"))


def rows(out: Path) -> pl.DataFrame:
    return pl.read_parquet(sorted((out / "data").glob("*.parquet"))).sort("user_id", "as_of")


def test_the_week_has_late_rows_and_something_to_make(before: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    events = [
        (int(rng.integers(USERS)), int(rng.integers(ITEMS)), int(rng.integers(NIGHTS * DAY)), n % 4, 1)
        for n in range(80)
    ]
    log_of(events).write_parquet(tmp_path / "all.parquet")
    run(Partition(tmp_path / "all.parquet", buckets=3), tmp_path / "log", ONE)
    stages = downstream(tmp_path / "log", before)
    found = {name: made(stage, tmp_path / name) for name, stage in stages.items()}
    assert all(value is not None for value in found.values()), found
