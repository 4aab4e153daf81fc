"""`gsu topk` from Parquet to Parquet: time, late rows, missing things, modes, string ids, faults."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank_cli.main import call
from prerank_tools.errors import ContractError, GateError, UsageError
from prerank_tools.gsu import stage as gsu_stage
from prerank_tools.gsu import vector_frames
from prerank_tools.gsu.stage import GsuConfig, GsuTopK
from prerank_tools.gsu.two_step import TwoStepConfig
from prerank_tools.run.job import RunOptions, run
from prerank_tools.tables.vectors import numpy_to_vectors

ITEMS = ["a", "b", "c", "d"]
VECTORS = np.array([[1, 0], [1, 1], [0, 1], [-1, 0]], dtype=np.float32)


def write(folder: Path, name: str, **columns: Any) -> Path:
    path = folder / f"{name}.parquet"
    pl.DataFrame(columns).write_parquet(path)
    return path


def write_embeddings(folder: Path, ids: list[Any], x_ND: np.ndarray, name: str = "emb") -> Path:
    return write(folder, name, item_id=ids, embedding=numpy_to_vectors("embedding", x_ND))


def small(folder: Path, **more: Any) -> GsuTopK:
    """User u: a at 10, b and d at 20, c at 30, x (no vector) at 40; asks at 20, 31, 100."""
    return GsuTopK(
        events=write(
            folder,
            "events",
            user_id=["u"] * 5,
            item_id=["a", "b", "d", "c", "x"],
            timestamp=[10, 20, 20, 30, 40],
        ),
        requests=write(
            folder,
            "requests",
            request_id=[3, 1, 2, 4],
            user_id=["u", "u", "u", "cold"],
            timestamp=[20, 31, 100, 50],
            candidates=[["a", "b"], ["a", "x"], ["b", "b"], ["a"]],
        ),
        embeddings=write_embeddings(folder, ITEMS, VECTORS),
        **more,
    )


def rows_of(stage: GsuTopK, out: Path, **options: Any) -> pl.DataFrame:
    run(stage, out, RunOptions(workers=1, **options))
    return pl.read_parquet(out / "data" / "*.parquet").sort("request_id", "item_id")


def test_a_request_sees_what_came_strictly_before_it(tmp_path: Path) -> None:
    frame = rows_of(small(tmp_path), tmp_path / "gsu")
    assert frame.select("request_id", "item_id", "has_vector", "n_valid").rows() == [
        # c is orthogonal to a, an exact zero: three of the four can be chosen.
        (1, "a", True, 3),
        (1, "x", False, 0),
        (2, "b", True, 4),
        (3, "a", True, 1),
        (3, "b", True, 1),
        (4, "a", True, 0),
    ]
    assert frame["behavior_ids"].to_list() == [["a", "b", "d"], [], ["b", "c", "a", "d"], ["a"], ["a"], []]
    # 0 is the oldest; b and d happened together, and the smaller id counts as the later.
    assert frame["positions"].to_list() == [[0, 2, 1], [], [2, 3, 0, 1], [0], [0], []]
    assert frame["sims"].to_list()[0] == [1.0, pytest.approx(0.7071, abs=1e-3), -1.0]


def test_histograms_are_of_the_cosines(tmp_path: Path) -> None:
    frame = rows_of(small(tmp_path), tmp_path / "gsu")
    assert frame.schema["simtier"] == pl.Array(pl.UInt8, 22)
    assert {tier: n for tier, n in enumerate(frame["simtier"].to_list()[0]) if n} == {0: 1, 18: 1, 20: 1}
    assert frame["simtier"].to_list()[0] == frame["simtier_recent"].to_list()[0]
    assert sum(frame["simtier"].to_list()[1]) == 0


@pytest.mark.parametrize(("emit", "absent"), [("topk", "simtier"), ("simtier", "sims"), ("both", "")])
def test_emit(tmp_path: Path, emit: Any, absent: str) -> None:
    frame = rows_of(small(tmp_path, emit=emit), tmp_path / "gsu")
    assert absent not in frame.columns and ("sims" in frame.columns or "simtier" in frame.columns)


def test_flat_requests_are_the_same_requests(tmp_path: Path) -> None:
    listed = small(tmp_path)
    flat = (
        pl.read_parquet(listed.requests)
        .explode("candidates")
        .rename({"candidates": "item_id"})
        .unique(maintain_order=True)
    )
    flat.write_parquet(tmp_path / "flat.parquet")
    again = GsuTopK(events=listed.events, requests=tmp_path / "flat.parquet", embeddings=listed.embeddings)
    assert rows_of(again, tmp_path / "flat").equals(rows_of(listed, tmp_path / "listed"))


def test_a_single_file_is_sorted_by_request_and_item(tmp_path: Path) -> None:
    run(small(tmp_path), tmp_path / "gsu.parquet", RunOptions(workers=1))
    assert pl.read_parquet(tmp_path / "gsu.parquet").height == 6


def test_cold_users_and_items_without_a_vector_are_counted_or_forbidden(tmp_path: Path) -> None:
    result = run(small(tmp_path), tmp_path / "gsu", RunOptions(workers=1))
    assert result.manifest is not None
    assert result.manifest.counts["cold"] == 1 and result.manifest.counts["without_vector"] == 1
    with pytest.raises(ContractError, match="1 candidates of users without a past, 1 without a vector"):
        run(small(tmp_path, missing="fail"), tmp_path / "strict", RunOptions(workers=1))
    assert not (tmp_path / "strict").exists()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), lag=st.sampled_from([0, 3]))
def test_no_request_sees_its_future_or_a_late_row(tmp_path_factory: Any, seed: int, lag: int) -> None:
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("log")
    n, users = int(rng.integers(1, 60)), [f"u{i}" for i in range(3)]
    time = rng.integers(0, 40, n)
    events = pl.DataFrame(
        {
            "user_id": rng.choice(users, n),
            "item_id": rng.integers(0, 12, n),
            "timestamp": time,
            "ingested_at": time + rng.choice([0, 0, 0, 5, 30], n),
        }
    )
    requests = pl.DataFrame(
        {
            "request_id": np.arange(8),
            "user_id": rng.choice(users, 8),
            "timestamp": rng.integers(0, 45, 8),
            "candidates": [rng.integers(0, 12, 4).tolist() for _ in range(8)],
        }
    )
    events.write_parquet(folder / "events.parquet")
    requests.write_parquet(folder / "requests.parquet")
    x_ND = rng.normal(size=(12, 3)).astype(np.float32)
    embeddings = write_embeddings(folder, list(range(12)), x_ND)
    stage = GsuTopK(
        events=folder / "events.parquet",
        requests=folder / "requests.parquet",
        embeddings=embeddings,
        config=GsuConfig(k=5, lag=lag),
    )
    for row in rows_of(stage, folder / "gsu").iter_rows(named=True):
        request = requests.row(row["request_id"], named=True)
        seen = events.filter(
            (pl.col("user_id") == request["user_id"])
            & (pl.col("timestamp") < request["timestamp"])
            & (pl.col("ingested_at") < request["timestamp"] - lag)
        ).sort(["timestamp", "item_id"], descending=[False, True])
        past = seen["item_id"].to_numpy()
        unit = x_ND.astype(np.float64) / np.linalg.norm(x_ND.astype(np.float64), axis=1, keepdims=True)
        sims = unit[past] @ unit[row["item_id"]]
        # Equal items have equal cosines here; the rounding of the oracle must not part them.
        order = sorted(range(len(past)), key=lambda i: (-round(sims[i], 12), -i))[:5]
        assert row["positions"] == order
        assert row["behavior_ids"] == past[order].tolist()
        assert row["n_valid"] == len(past) and sum(row["simtier"]) == min(5, len(past))


def test_slices_of_a_bucket_and_workers_give_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = random_stage(tmp_path)
    whole = rows_of(stage, tmp_path / "whole")
    monkeypatch.setattr(gsu_stage, "SHARD_BYTES", 20_000)
    sliced = run(stage, tmp_path / "sliced", RunOptions(workers=1))
    assert sliced.manifest is not None and len(sliced.manifest.timing["shard_seconds"]) > 4
    assert (
        pl.read_parquet(tmp_path / "sliced" / "data" / "*.parquet")
        .sort("request_id", "item_id")
        .equals(whole)
    )


def test_a_mapped_catalogue_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = random_stage(tmp_path)
    held = rows_of(stage, tmp_path / "held")
    monkeypatch.setattr(vector_frames, "MAPPED_BYTES", 0)
    assert rows_of(stage, tmp_path / "mapped").equals(held)
    assert not (tmp_path / "mapped" / "_tmp").exists()


def test_int8_vectors_with_or_without_a_scale(tmp_path: Path) -> None:
    stage = random_stage(tmp_path)
    ids = pl.read_parquet(stage.embeddings)["item_id"]
    rng = np.random.default_rng(1)
    stored = rng.integers(-127, 128, (len(ids), 24)).astype(np.int8)
    write_embeddings(tmp_path, ids.to_list(), stored, "vectors")
    plain = rows_of(stage, tmp_path / "plain")
    scale_N = rng.uniform(0.01, 3.0, len(ids))
    scaled = pl.read_parquet(stage.embeddings).with_columns(pl.Series("scale", scale_N))
    scaled.write_parquet(stage.embeddings)
    assert rows_of(stage, tmp_path / "scaled").equals(plain)
    wide = (stored * scale_N[:, None]).astype(np.float32)
    write_embeddings(tmp_path, ids.to_list(), wide, "vectors")
    same = rows_of(stage, tmp_path / "wide")["sims"].explode().to_numpy()
    np.testing.assert_allclose(plain["sims"].explode().to_numpy(), same, atol=1e-3)


def random_stage(folder: Path, **more: Any) -> GsuTopK:
    """String users, items with a vector but for a few, 40 requests of 15 candidates."""
    rng = np.random.default_rng(0)
    users, items = [f"用户{n}" for n in range(9)], [f"商品{n}" for n in range(70)]
    return GsuTopK(
        events=write(
            folder,
            "log",
            user_id=rng.choice(users, 3000),
            item_id=rng.choice(items, 3000),
            timestamp=rng.integers(0, 999, 3000),
        ),
        requests=write(
            folder,
            "asked",
            request_id=[f"r{n:02d}" for n in range(40)],
            user_id=rng.choice(users, 40),
            timestamp=rng.integers(0, 999, 40),
            candidates=[rng.choice(items, 15, replace=False).tolist() for _ in range(40)],
        ),
        embeddings=write_embeddings(
            folder, items[3:], rng.normal(size=(67, 24)).astype(np.float16), "vectors"
        ),
        **more,
    )


def test_sim_hard_takes_the_latest_of_the_same_category(tmp_path: Path) -> None:
    items = write(tmp_path, "items", item_id=ITEMS, category=["red", "red", "red", "blue"])
    frame = rows_of(small(tmp_path, mode="sim-hard", items=items, config=GsuConfig(k=2)), tmp_path / "gsu")
    assert frame["behavior_ids"].to_list()[0] == ["c", "b"]
    assert frame["sims"].to_list()[0] == [0.0, pytest.approx(0.7071, abs=1e-3)]
    assert frame["n_valid"].to_list()[0] == 3


def test_sid_prefix_backs_off_level_by_level(tmp_path: Path) -> None:
    codes = pl.Series("codes", [[1, 1], [1, 1], [1, 2], [2, 1]], dtype=pl.Array(pl.UInt16, 2))
    sids = write(tmp_path, "sids", item_id=ITEMS, codes=codes, sid=["", "", "", ""])
    frame = rows_of(small(tmp_path, mode="sid-prefix", sids=sids), tmp_path / "gsu")
    # a: b and a share both levels, the later first; then c, which shares one; d shares none.
    assert frame["behavior_ids"].to_list()[0] == ["b", "a", "c"]


def test_sim_soft_chooses_by_ids_and_reports_the_cosine_of_the_content(tmp_path: Path) -> None:
    ids = write_embeddings(tmp_path, ITEMS, VECTORS[::-1].copy(), "ids")
    frame = rows_of(small(tmp_path, mode="sim-soft", id_embeddings=ids), tmp_path / "gsu")
    # By ids a is itself, 135 degrees from c, opposite to d and orthogonal to b; by content orthogonal to c.
    assert frame["behavior_ids"].to_list()[0] == ["a", "c", "d"]
    assert frame["sims"].to_list()[0] == [1.0, 0.0, -1.0]


def test_a_mode_without_its_table_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--mode sid-prefix needs --sids"):
        run(small(tmp_path, mode="sid-prefix"), tmp_path / "gsu", RunOptions(workers=1))


def test_milliseconds_in_an_epoch_column(tmp_path: Path) -> None:
    stage = small(tmp_path)
    pl.read_parquet(stage.events).with_columns(pl.col("timestamp") + 1_700_000_000_000).write_parquet(
        stage.events
    )
    with pytest.raises(ContractError, match="`timestamp` reaches 1700000000040"):
        run(stage, tmp_path / "gsu", RunOptions(workers=1))


def test_ids_of_two_types_are_refused(tmp_path: Path) -> None:
    stage = small(tmp_path)
    write_embeddings(tmp_path, [1, 2, 3, 4], VECTORS)
    with pytest.raises(ContractError, match=r"`item_id` is Int64, in .* it is String"):
        run(stage, tmp_path / "gsu", RunOptions(workers=1))


def test_unusable_vectors_and_requests_go_to_quarantine(tmp_path: Path) -> None:
    stage = small(tmp_path)
    write_embeddings(tmp_path, [*ITEMS, "x"], np.vstack([VECTORS, [[np.nan, 0]]]).astype(np.float32))
    requests = pl.read_parquet(stage.requests)
    pl.concat(
        [
            requests,
            requests.head(1).with_columns(request_id=pl.lit(9, pl.Int64), user_id=pl.lit(None, pl.String)),
        ]
    ).write_parquet(stage.requests)
    with pytest.raises(ContractError, match="2 of 10 rows are unusable"):
        run(stage, tmp_path / "gsu", RunOptions(workers=1))
    frame = rows_of(stage, tmp_path / "gsu", max_bad=0.5)
    assert frame["has_vector"].to_list()[1] is False
    bad = pl.concat(
        [pl.read_parquet(p) for p in (tmp_path / "gsu" / "quarantine").rglob("*.parquet")], how="diagonal"
    )
    assert sorted(bad["reason"].to_list()) == ["user_id is null", "vector holds NaN or infinity"]


def test_dry_run_says_how_many_bytes_each_emit_would_write(tmp_path: Path) -> None:
    stage = random_stage(tmp_path)
    plan = run(stage, tmp_path / "gsu", RunOptions(dry_run=True)).plan
    assert plan["rows_out"] == 600
    assert not (tmp_path / "gsu").exists()
    for emit in ("topk", "simtier", "both"):
        made = run(replace(stage, emit=emit), tmp_path / emit, RunOptions(workers=1)).manifest
        assert made is not None
        assert 0.75 < plan["bytes_if"][f"emit {emit}"] / made.outputs["bytes"] < 1.25


def test_the_log_leaves_no_data_cutoff(tmp_path: Path) -> None:
    result = run(small(tmp_path), tmp_path / "gsu", RunOptions(workers=1))
    assert result.manifest is not None and result.manifest.data_cutoff is None


def test_chinese_log_through_the_command(
    tmp_path: Path,
    chinese_items: pl.DataFrame,
    chinese_events: pl.DataFrame,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chinese_events.write_parquet(tmp_path / "e.parquet")
    last = chinese_events["timestamp"].max()
    users = chinese_events["user_id"].unique().sort()
    write(
        tmp_path,
        "r",
        request_id=[f"请求{n}" for n in range(6)],
        user_id=users,
        timestamp=[last] * 6,
        candidates=[chinese_items["item_id"].to_list()] * 6,
    )
    x_ND = np.eye(12, dtype=np.float32)[chinese_items["product"].to_numpy()]
    write_embeddings(tmp_path, chinese_items["item_id"].to_list(), x_ND)
    words = ["gsu", "topk", "--requests", tmp_path / "r.parquet", "--events", tmp_path / "e.parquet"]
    words += ["--embeddings", tmp_path / "emb.parquet", "-o", tmp_path / "gsu", "--json", "--workers", "1"]
    assert call([str(word) for word in words]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rows"] == 6 * 24
    product = dict(chinese_items.select("item_id", "product").iter_rows())
    for row in pl.read_parquet(tmp_path / "gsu" / "data" / "*.parquet").iter_rows(named=True):
        assert {product[item] for item in row["behavior_ids"]} <= {product[row["item_id"]]}


def test_missing_column_is_one_line_and_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = small(tmp_path)
    pl.read_parquet(stage.events).drop("timestamp").write_parquet(stage.events)
    words = [
        "gsu",
        "topk",
        "--requests",
        stage.requests,
        "--events",
        stage.events,
        "--embeddings",
        stage.embeddings,
    ]
    assert call([str(word) for word in [*words, "-o", tmp_path / "gsu"]]) == 3
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: ") and "timestamp" in said[0] and said[1].startswith("hint: ")
    assert not (tmp_path / "gsu").exists()


@pytest.mark.parametrize("index", ["ivf", "hnsw", "items"])
def test_two_steps_say_what_they_miss(tmp_path: Path, index: Any) -> None:
    config = GsuConfig(k=10, index=TwoStepConfig(heavy=200, listed=40, probe=8, neighbors=30))
    stage = random_stage(tmp_path, config=config)
    exact = rows_of(stage, tmp_path / "exact")
    two = replace(stage, two_step=index, min_recall=0.0)
    result = run(two, tmp_path / "two", RunOptions(workers=1))
    assert result.manifest is not None
    recall = result.manifest.quality["two_step_recall"]
    found = pl.read_parquet(tmp_path / "two" / "data" / "*.parquet").sort("request_id", "item_id")
    assert found["n_valid"].to_list() == exact["n_valid"].to_list() or recall < 1
    assert 0.5 < recall <= 1
    short = exact.filter(pl.col("n_valid") < 150)
    assert found.join(short, on=["request_id", "item_id"]).height == short.height
    same = found.join(exact, on=["request_id", "item_id"])
    hits = sum(len(set(a) & set(b)) for a, b in zip(same["positions"], same["positions_right"], strict=True))
    assert hits / exact["positions"].list.len().sum() > 0.5
    assert (found["simtier"].arr.sum() == found["sims"].list.len()).all()


def test_two_steps_below_the_recall_publish_nothing(tmp_path: Path) -> None:
    config = GsuConfig(k=20, index=TwoStepConfig(heavy=100, listed=20, lists=50, probe=1))
    stage = random_stage(tmp_path, config=config, two_step="ivf", min_recall=0.99)
    with pytest.raises(GateError, match="less than --min-recall"):
        run(stage, tmp_path / "gsu", RunOptions(workers=1))
    assert not (tmp_path / "gsu").exists()


def test_two_steps_with_everything_listed_are_exact(tmp_path: Path) -> None:
    config = GsuConfig(k=10, index=TwoStepConfig(heavy=100, listed=600, lists=4, probe=4))
    stage = random_stage(tmp_path, config=config)
    exact = rows_of(stage, tmp_path / "exact")
    assert rows_of(replace(stage, two_step="ivf", min_recall=1.0), tmp_path / "two").equals(exact)
