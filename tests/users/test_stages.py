"""`train user`, `embed users`, `eval users` from Parquet to Parquet: time, increments, spaces, faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.run.job import Result, RunOptions, run
from prerank_tools.tables.vectors import numpy_to_vectors
from prerank_tools.users import train_stage
from prerank_tools.users.eval_stage import evaluate_users
from prerank_tools.users.stage import EmbedUsers
from prerank_tools.users.train_stage import TrainUser, TrainUserConfig, UserTraining

DAY = 86_400
ONE = RunOptions(workers=1, threads=1)
T = 1_600_000_000 // DAY * DAY
QUICK = TrainUserConfig.model_validate(
    {
        "model": {"layers": 2, "width": 16, "head_width": 8, "query_rank": 8, "kv_rank": 8, "query_tokens": 2,
                  "summaries": 2, "summary_width": 4, "summary_rank": 4, "item_buckets": 16, "part": 4},
        "training": {"epochs": 2, "batch_size": 8, "patience": 0},
        "max_events": 16, "positives": 2, "negatives": 4, "backbone_width": 8, "valid_share": 0.3,
    }
)  # fmt: skip


def some_events(*, users: int = 12, days: int = 20, seed: int = 0) -> pl.DataFrame:
    """Users buy two of the items of their taste on random days; before day 0 of T."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        for day in sorted(rng.choice(days, 6, replace=False)):
            time = T + int(day - days) * DAY + int(rng.integers(DAY))
            for place in rng.choice(6, 2, replace=False):
                item = f"商品{2 * place + user % 2}"
                rows.append(
                    {"user_id": f"用户{user}", "item_id": item, "timestamp": time, "action": "purchase"}
                )
    return pl.DataFrame(rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A log, item vectors with a lineage of their own, and a user model trained until T."""
    folder = tmp_path_factory.mktemp("users")
    events = some_events()
    events.write_parquet(folder / "events.parquet")
    x_ND = np.random.default_rng(1).standard_normal((11, 6)).astype(np.float32)  # item 11 has no vector
    ids = [f"商品{n}" for n in range(11)]
    pl.DataFrame({"item_id": ids, "embedding": numpy_to_vectors("embedding", x_ND)}).write_parquet(
        folder / "emb.parquet"
    )
    paths = {name: folder / f"{name}.parquet" for name in ("events", "emb")} | {"folder": folder}
    run(
        TrainUser(paths["events"], paths["emb"], until=T, config=QUICK),
        folder / "model",
        ONE,
    )
    return paths | {"model": folder / "model"}


def embed(world: dict[str, Path], out: Path, events: pl.DataFrame | None = None, **words: Any) -> Result:
    path = world["events"]
    if events is not None:
        path = out.parent / f"{out.name}_events.parquet"
        events.write_parquet(path)
    stage = EmbedUsers(path, world["emb"], world["model"], **words)
    return run(stage, out, ONE)


def rows_of(out: Path) -> pl.DataFrame:
    return pl.read_parquet(sorted((out / "data").glob("*.parquet"))).sort("user_id", "as_of")


def counts_of(result: Result) -> dict[str, Any]:
    assert result.manifest is not None
    return {**result.manifest.counts}


def test_training_repeats_to_the_byte(world: dict[str, Path], tmp_path: Path) -> None:
    stage = TrainUser(world["events"], world["emb"], until=T, config=QUICK)
    run(stage, tmp_path / "model", ONE)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (world["model"] / name).read_bytes()


def test_killed_training_goes_on_and_ends_in_the_same_bytes(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = train_stage.evaluate

    def dies(*words: Any) -> dict[str, float]:
        if (tmp_path / ".model.partial/_tmp/training/metrics.jsonl").stat().st_size:
            raise KeyboardInterrupt
        return measured(*words)

    stage = TrainUser(world["events"], world["emb"], until=T, config=QUICK)
    monkeypatch.setattr(train_stage, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        run(stage, tmp_path / "model", ONE)
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(train_stage, "evaluate", measured)
    events: list[str] = []
    run(stage, tmp_path / "model", replace(ONE, log=lambda event, **_: events.append(event)))
    assert "resumed" in events
    weights = "model.safetensors"
    assert (tmp_path / "model" / weights).read_bytes() == (world["model"] / weights).read_bytes()


def test_preset_is_a_shape_that_other_keys_override() -> None:
    config = TrainUserConfig.model_validate({"preset": "paper", "model": {"layers": 6}, "max_events": 460})
    assert (config.model.layers, config.model.width, config.model.kv_rank) == (6, 256, 96)
    assert config.max_events == 460
    assert TrainUserConfig.model_validate({"training": {"lr": 0.1}}).training.epochs == UserTraining().epochs


def test_training_ignores_what_comes_at_or_after_until(world: dict[str, Path], tmp_path: Path) -> None:
    events = pl.read_parquet(world["events"])
    later = events.with_columns(timestamp=pl.lit(T, dtype=pl.Int64), action=pl.lit("view"))
    pl.concat([events, later]).write_parquet(tmp_path / "events.parquet")
    stage = TrainUser(tmp_path / "events.parquet", world["emb"], until=T, config=QUICK)
    result = run(stage, tmp_path / "model", ONE)
    weights = "model.safetensors"
    assert (tmp_path / "model" / weights).read_bytes() == (world["model"] / weights).read_bytes()
    assert result.manifest is not None
    assert result.manifest.data_cutoff == events["timestamp"].max()


def test_model_says_what_it_learned_on(world: dict[str, Path]) -> None:
    manifest = json.loads((world["model"] / "manifest.json").read_text())
    config = json.loads((world["model"] / "config.json").read_text())
    assert (config["heads"], config["actions"], config["content"]) == (["purchase"], ["purchase"], 6)
    assert 0 < manifest["quality"]["ne"] < 3
    assert len(manifest["lineage"]["user_model"]) == 64


def test_one_row_a_user_and_time_with_a_past(world: dict[str, Path], tmp_path: Path) -> None:
    events = pl.read_parquet(world["events"])
    middle = T - 10 * DAY
    result = embed(world, tmp_path / "uemb", as_of=(T, middle))
    frame = rows_of(tmp_path / "uemb")
    expected = [
        (user, at, count)
        for at in (middle, T)
        for user, count in events.filter(pl.col("timestamp") < at).group_by("user_id").len().rows()
    ]
    assert frame.select("user_id", "as_of", "n_events").rows() == sorted(expected)
    assert frame.schema["embedding"] == pl.Array(pl.Float32, 8)
    assert counts_of(result)["computed"] == len(expected)
    assert result.manifest is not None
    assert result.manifest.data_cutoff == events["timestamp"].max()


def test_events_at_or_after_the_time_change_nothing(world: dict[str, Path], tmp_path: Path) -> None:
    events = pl.read_parquet(world["events"])
    at = int(events["timestamp"].sort()[60])
    embed(world, tmp_path / "past", events.filter(pl.col("timestamp") < at), as_of=(at,))
    embed(world, tmp_path / "whole", as_of=(at,))
    assert rows_of(tmp_path / "past").equals(rows_of(tmp_path / "whole"))


def test_event_that_came_in_late_is_used_when_it_is_known(world: dict[str, Path], tmp_path: Path) -> None:
    events = pl.read_parquet(world["events"]).with_columns(ingested_at=pl.col("timestamp"))
    late = events.with_row_index("n").with_columns(
        ingested_at=pl.when(pl.col("n") == 0).then(T).otherwise("ingested_at")
    ).drop("n")  # fmt: skip
    embed(world, tmp_path / "late", late, as_of=(T, T + DAY))
    embed(world, tmp_path / "without", events[1:], as_of=(T,))
    embed(world, tmp_path / "with", events, as_of=(T + DAY,))
    found = rows_of(tmp_path / "late")
    assert found.filter(as_of=T).equals(rows_of(tmp_path / "without"))
    assert found.filter(as_of=T + DAY).equals(rows_of(tmp_path / "with"))


def test_requests_are_embedded_as_of_their_day(world: dict[str, Path], tmp_path: Path) -> None:
    requests = pl.DataFrame(
        {
            "request_id": [1, 2, 3, 4],
            "user_id": ["用户1", "用户1", "用户2", "nobody"],
            "timestamp": [T + 5, T + 7, T - DAY + 9, T],
            "candidates": [["商品1"]] * 4,
        }
    )
    requests.write_parquet(tmp_path / "r.parquet")
    result = embed(world, tmp_path / "uemb", requests=tmp_path / "r.parquet")
    frame = rows_of(tmp_path / "uemb")
    assert frame.select("user_id", "as_of").rows() == [("用户1", T), ("用户2", T - DAY)]
    assert counts_of(result)["cold"] == 1
    embed(world, tmp_path / "all", as_of=(T, T - DAY))
    assert frame.equals(
        rows_of(tmp_path / "all").join(frame.select("user_id", "as_of"), on=["user_id", "as_of"])
    )


def test_incremental_run_equals_a_full_one(world: dict[str, Path], tmp_path: Path) -> None:
    events = pl.read_parquet(world["events"])
    embed(world, tmp_path / "night1", events.filter(pl.col("timestamp") < T - DAY), as_of=(T - DAY,))
    new = {"user_id": ["用户3", "新用户"], "item_id": ["商品2", "商品3"], "timestamp": [T - 9, T - 5]}
    late = {"user_id": ["用户4"], "item_id": ["商品5"], "timestamp": [T - 15 * DAY]}
    arrived = [pl.DataFrame(rows).with_columns(action=pl.lit("purchase")) for rows in (new, late)]
    tonight = pl.concat([events, *arrived])
    embed(world, tmp_path / "full", tonight, as_of=(T,))
    result = embed(world, tmp_path / "night2", tonight, as_of=(T,), previous=tmp_path / "night1")
    assert rows_of(tmp_path / "night2").equals(rows_of(tmp_path / "full"))
    last_day = set(events.filter(pl.col("timestamp") >= T - DAY)["user_id"])
    changed = last_day | {"用户3", "新用户", "用户4"}
    assert counts_of(result)["computed"] == len(changed)
    assert counts_of(result)["reused"] == 13 - len(changed)


def test_previous_made_in_other_buckets_serves_as_well(world: dict[str, Path], tmp_path: Path) -> None:
    embed(world, tmp_path / "one.parquet", as_of=(T,))
    result = embed(world, tmp_path / "two", as_of=(T,), previous=tmp_path / "one.parquet")
    assert (counts_of(result)["computed"], counts_of(result)["reused"]) == (0, 12)
    assert rows_of(tmp_path / "two").equals(
        pl.read_parquet(tmp_path / "one.parquet").sort("user_id", "as_of")
    )


def test_edited_item_reopens_the_users_who_met_it(world: dict[str, Path], tmp_path: Path) -> None:
    events = pl.read_parquet(world["events"])
    embed(world, tmp_path / "before", as_of=(T,))
    edited = pl.read_parquet(world["emb"])
    x_ND = edited["embedding"].to_numpy().copy()
    x_ND[4] += 1
    edited.with_columns(numpy_to_vectors("embedding", x_ND)).write_parquet(tmp_path / "emb.parquet")
    result = embed(
        world | {"emb": tmp_path / "emb.parquet"},
        tmp_path / "after",
        as_of=(T,),
        previous=tmp_path / "before",
    )
    assert counts_of(result)["computed"] == events.filter(item_id="商品4")["user_id"].n_unique()


def test_erased_users_leave_the_table(world: dict[str, Path], tmp_path: Path) -> None:
    embed(world, tmp_path / "before", as_of=(T,))
    pl.DataFrame({"user_id": ["用户0", "用户7"]}).write_parquet(tmp_path / "erased.parquet")
    words = {"previous": tmp_path / "before", "erased": tmp_path / "erased.parquet"}
    embed(world, tmp_path / "after", as_of=(T,), **words)
    before, after = rows_of(tmp_path / "before"), rows_of(tmp_path / "after")
    assert after.equals(before.filter(~pl.col("user_id").is_in(["用户0", "用户7"])))


def test_continued_training_starts_from_the_earlier_model(world: dict[str, Path], tmp_path: Path) -> None:
    more = pl.concat(
        [pl.read_parquet(world["events"]), some_events(seed=5).with_columns(action=pl.lit("click"))]
    )
    more.write_parquet(tmp_path / "events.parquet")
    stage = TrainUser(
        tmp_path / "events.parquet", world["emb"], until=T, init_from=world["model"], config=QUICK
    )
    run(stage, tmp_path / "model", ONE)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["actions"] == ["purchase", "click"]  # places never move


@pytest.mark.parametrize(
    ("words", "fault", "message"),
    [
        ({}, UsageError, "needs the times"),
        ({"as_of": (T,), "previous": True}, ContractError, "not by"),
    ],
)
def test_what_cannot_work_is_refused(
    world: dict[str, Path], tmp_path: Path, words: dict[str, Any], fault: type[Exception], message: str
) -> None:
    if words.get("previous"):
        pl.DataFrame(
            {
                "user_id": ["u"],
                "as_of": [1],
                "embedding": numpy_to_vectors("embedding", np.ones((1, 8), "f4")),
            }
        ).write_parquet(tmp_path / "old.parquet")
        words = {**words, "previous": tmp_path / "old.parquet"}
    with pytest.raises(fault, match=message):
        embed(world, tmp_path / "uemb", **words)
    assert not (tmp_path / "uemb").exists()


def damaged(change: Callable[[pl.DataFrame], pl.DataFrame], world: dict[str, Path], to: Path) -> Path:
    change(pl.read_parquet(world["emb"])).write_parquet(to)
    return to


def test_vectors_of_another_width_or_ids_are_refused(world: dict[str, Path], tmp_path: Path) -> None:
    narrow = damaged(
        lambda e: e.with_columns(numpy_to_vectors("embedding", e["embedding"].to_numpy()[:, :4])),
        world,
        tmp_path / "narrow.parquet",
    )
    with pytest.raises(ContractError, match="4 dims"):
        embed(world | {"emb": narrow}, tmp_path / "uemb", as_of=(T,))
    numbered = damaged(
        lambda e: e.with_columns(item_id=pl.Series(range(len(e)))), world, tmp_path / "numbered.parquet"
    )
    with pytest.raises(ContractError, match="item_id is String, but Int64"):
        embed(world | {"emb": numbered}, tmp_path / "uemb", as_of=(T,))


def test_vectors_of_another_encoder_are_refused(world: dict[str, Path], tmp_path: Path) -> None:
    def published(name: str, encoder: str) -> Path:
        folder = tmp_path / name
        (folder / "data").mkdir(parents=True)
        part = folder / "data/part-00000.parquet"
        part.write_bytes(world["emb"].read_bytes())
        parts = [{"path": "data/part-00000.parquet", "bytes": part.stat().st_size, "rows": 11}]
        manifest = {"content_digest": name, "lineage": {"encoder": encoder}, "outputs": {"parts": parts}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    run(
        TrainUser(world["events"], published("one", "aaa"), until=T, config=QUICK),
        tmp_path / "model",
        ONE,
    )
    other = world | {"model": tmp_path / "model", "emb": published("two", "bbb")}
    with pytest.raises(ContractError, match="embedded by encoder bbb"):
        embed(other, tmp_path / "uemb", as_of=(T,))
    result = embed(other | {"emb": published("same", "aaa")}, tmp_path / "uemb", as_of=(T,))
    assert result.manifest is not None
    assert result.manifest.lineage["encoder"] == "aaa"


def test_probe_reports_hits_beside_baselines(world: dict[str, Path], tmp_path: Path) -> None:
    cut = T - 4 * DAY
    stage = TrainUser(world["events"], world["emb"], until=cut, config=QUICK)
    run(stage, tmp_path / "model", ONE)
    embed(world | {"model": tmp_path / "model"}, tmp_path / "uemb", as_of=(cut,))
    report = evaluate_users(tmp_path / "uemb", world["events"], world["emb"], k=3)
    assert report["at"] == cut
    events = pl.read_parquet(world["events"])
    later = events.filter((pl.col("timestamp") >= cut) & (pl.col("item_id") != "商品11"))[
        "user_id"
    ].n_unique()
    assert report["users"] == later
    rates = report["hit_rate"]
    assert set(rates) == {"probe", "probe_of_mean_content", "probe_of_nothing", "content", "popularity"}
    assert all(0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1 for rate in rates.values())


def test_vectors_that_have_seen_the_answer_are_refused(world: dict[str, Path], tmp_path: Path) -> None:
    embed(world, tmp_path / "uemb", as_of=(T,))
    with pytest.raises(ContractError, match="has seen events"):
        evaluate_users(tmp_path / "uemb", world["events"], world["emb"], at=T - 10 * DAY)


def test_chinese_log_with_sessions_goes_through(
    tmp_path: Path, chinese_items: pl.DataFrame, chinese_events: pl.DataFrame
) -> None:
    chinese_events.write_parquet(tmp_path / "events.parquet")
    x_ND = np.random.default_rng(0).standard_normal((len(chinese_items), 6)).astype(np.float32)
    chinese_items.select("item_id", numpy_to_vectors("embedding", x_ND)).write_parquet(
        tmp_path / "emb.parquet"
    )
    at = int(chinese_events["timestamp"].max()) + 1  # type: ignore[call-overload]
    paths = {
        "events": tmp_path / "events.parquet",
        "emb": tmp_path / "emb.parquet",
        "model": tmp_path / "model",
    }
    run(TrainUser(paths["events"], paths["emb"], config=QUICK), paths["model"], ONE)
    assert json.loads((paths["model"] / "config.json").read_text())["heads"] == ["click", "purchase"]
    embed(paths, tmp_path / "uemb", as_of=(at,))
    assert rows_of(tmp_path / "uemb")["user_id"].to_list() == [f"用户{n}" for n in range(6)]
