"""`train scorer` and `score` on tables: forms of input, time, missing things, refusals, repetition."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.features.stage import Features
from prerank_tools.metrics.ranking import auc
from prerank_tools.run.job import RunOptions, run
from prerank_tools.scorers import artefact
from prerank_tools.scorers.checks import check_cutoffs, check_spaces
from prerank_tools.scorers.score_stage import Score, rank_within
from prerank_tools.scorers.train_stage import TrainScorer, grown_words, split_latest


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scorers_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shop = _load("shop")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Path]:
    """A shop with int ids and list requests, and a scorer trained on it with user vectors."""
    folder = tmp_path_factory.mktemp("shop")
    paths = shop.write_shop(folder)
    return folder, paths, shop.trained(folder, paths)


def test_scores_rank_every_candidate_and_beat_chance(world: tuple[Path, Any, Path], tmp_path: Path) -> None:
    _, paths, model = world
    scores = shop.scored(tmp_path, paths, model)
    assert scores.columns == ["request_id", "item_id", "rank", "score", "p_click"]
    late = pl.read_parquet(tmp_path / "late.parquet")
    assert len(scores) == 8 * len(late)
    ranks = scores.sort("request_id", "score", descending=[False, True]).group_by("request_id").agg("rank")
    assert all(sorted(rank) == list(range(1, 9)) for rank in ranks["rank"].to_list())
    labels = late.explode("candidates", "label_click").rename({"candidates": "item_id"})
    joined = labels.join(scores, on=["request_id", "item_id"])
    assert auc(joined["label_click"].to_numpy(), joined["score"].to_numpy()) > 0.8


def test_top_keeps_the_best(world: tuple[Path, Any, Path], tmp_path: Path) -> None:
    _, paths, model = world
    whole, best = (
        shop.scored(tmp_path, paths, model),
        shop.scored(tmp_path, paths, model, name="t.parquet", top=3),
    )
    assert best.equals(whole.filter(pl.col("rank") <= 3))


@pytest.mark.parametrize(("strings", "flat"), [(True, False), (False, True), (True, True)])
def test_ids_and_forms_change_no_score(
    world: tuple[Path, Any, Path], tmp_path: Path, strings: bool, flat: bool
) -> None:
    _, paths, model = world
    expected = shop.scored(tmp_path / "..", paths, model, name=f"{strings}{flat}.parquet")
    other = shop.write_shop(tmp_path / "other", strings=strings, flat=flat)
    found = shop.scored(tmp_path / "other", other, model)
    if strings:
        expected = shop.with_string_ids(expected)
    keys = ["request_id", "item_id"]
    expected, found = expected.sort(keys), found.sort(keys)
    assert found.select(*keys, "rank").equals(expected.select(*keys, "rank"))
    np.testing.assert_allclose(found["score"].to_numpy(), expected["score"].to_numpy(), rtol=1e-5)


def test_later_events_never_change_a_request(world: tuple[Path, Any, Path], tmp_path: Path) -> None:
    _, _, model = world
    paths = shop.write_shop(tmp_path)
    before = shop.scored(tmp_path, paths, model)
    start = 50 * shop.DAY
    early = pl.read_parquet(paths.requests).filter(pl.col("timestamp") <= start)["request_id"]
    moved = pl.when(pl.col("timestamp") >= start).then(0).otherwise("item_id").alias("item_id")
    shop.edit(paths.events, lambda e: e.with_columns(moved))
    after = shop.scored(tmp_path, paths, model, name="after.parquet")
    chosen = pl.col("request_id").is_in(early.implode())
    assert before.filter(chosen).equals(after.filter(chosen))
    assert not before.equals(after)


def test_stored_statistics_and_simtier_equal_those_made_inline(
    world: tuple[Path, Any, Path], tmp_path: Path
) -> None:
    from prerank_tools.gsu.stage import GsuTopK

    _, paths, model = world
    inline = shop.scored(tmp_path, paths, model)
    late = tmp_path / "late.parquet"
    run(Features(paths.events, late), tmp_path / "features", shop.ONE)
    run(GsuTopK(late, paths.events, paths.embeddings), tmp_path / "gsu", shop.ONE)
    given = replace(paths, features=tmp_path / "features", gsu=tmp_path / "gsu")
    assert shop.scored(tmp_path, given, model, name="given.parquet").equals(inline)


def test_an_unknown_item_a_missing_vector_and_a_cold_user_are_scored_and_counted(
    world: tuple[Path, Any, Path], tmp_path: Path
) -> None:
    _, _, model = world
    paths = shop.write_shop(tmp_path)
    shop.edit(paths.embeddings, lambda v: v.filter(pl.col("item_id") != 3))
    shop.edit(paths.users, lambda v: v.filter(pl.col("user_id") != 5))
    renamed = pl.col("candidates").list.eval(pl.element().replace({4: 999}))
    shop.edit(paths.requests, lambda r: r.with_columns(renamed))
    scores = shop.scored(tmp_path, paths, model, name="s")
    manifest = pl.read_json(tmp_path / "s" / "manifest.json")["counts"][0]
    late = pl.read_parquet(tmp_path / "late.parquet")
    offered = late.explode("candidates")["candidates"]
    assert manifest["unknown_items"] == (offered == 999).sum() > 0
    assert manifest["without_vector"] == offered.is_in([3, 999]).sum()
    assert manifest["cold_users"] == (late["user_id"] == 5).sum() > 0
    assert len(scores) == 8 * len(late) and scores["score"].is_finite().all()
    with pytest.raises(ContractError, match="have no vector"):
        shop.scored(tmp_path, paths, model, name="strict", missing="fail")


def test_a_null_request_is_set_aside(world: tuple[Path, Any, Path], tmp_path: Path) -> None:
    _, paths, model = world
    late = pl.read_parquet(paths.requests).filter(pl.col("timestamp") >= shop.CUT)
    first = pl.col("request_id") == late["request_id"][0]
    broken = pl.when(~first).then("timestamp").alias("timestamp")
    late.with_columns(broken).write_parquet(tmp_path / "broken.parquet")
    stage = Score(replace(paths, requests=tmp_path / "broken.parquet"), model=model)
    with pytest.raises(ContractError, match="--max-bad"):
        run(stage, tmp_path / "s", shop.ONE)
    result = run(stage, tmp_path / "s", replace(shop.ONE, max_bad=0.5))
    assert result.manifest is not None and result.manifest.counts["quarantined"] == 1
    assert result.manifest.outputs["rows"] == 8 * (len(late) - 1)


def test_the_same_work_gives_the_same_bytes(world: tuple[Path, Any, Path], tmp_path: Path) -> None:
    _, paths, model = world
    again = shop.trained(tmp_path, paths)
    for name in ("config.json", "model.safetensors"):
        assert (model / name).read_bytes() == (again / name).read_bytes()
    shop.scored(tmp_path, paths, model)  # writes late.parquet
    stage = Score(replace(paths, requests=tmp_path / "late.parquet"), model=model)
    alone = run(stage, tmp_path / "one", shop.ONE).manifest
    both = run(stage, tmp_path / "two", RunOptions(workers=2, threads=1)).manifest
    assert alone is not None and both is not None
    assert alone.content_digest == both.content_digest and alone.counts == both.counts


def test_training_without_users_ignores_them_and_with_users_asks_for_them(
    world: tuple[Path, Any, Path], tmp_path: Path
) -> None:
    _, paths, model = world
    without = shop.trained(tmp_path, replace(paths, users=None))
    assert artefact.read_spec(without).user == 0
    shop.scored(tmp_path, paths, without)
    with pytest.raises(UsageError, match="trained with users"):
        shop.scored(tmp_path, replace(paths, users=None), model, name="no.parquet")


def test_sids_are_learned_and_then_asked_for(world: tuple[Path, Any, Path], tmp_path: Path) -> None:
    _, paths, _ = world
    ids = np.arange(shop.ITEMS)
    codes = np.stack([ids % 3, ids // 3], axis=1).astype(np.uint16)
    sids = pl.DataFrame({"item_id": ids, "codes": codes, "sid": [f"<a_{a}><b_{b}>" for a, b in codes]})
    sids.write_parquet(tmp_path / "sid.parquet")
    given = replace(paths, sids=tmp_path / "sid.parquet")
    model = shop.trained(tmp_path, given)
    assert artefact.read_spec(model).shape.code_sizes == {"level_0": 3, "level_1": 8, "category": 3}
    assert len(shop.scored(tmp_path, given, model))
    with pytest.raises(UsageError, match="trained with sids"):
        shop.scored(tmp_path, paths, model, name="no.parquet")


def test_other_widths_and_ids_that_never_meet_are_refused(
    world: tuple[Path, Any, Path], tmp_path: Path
) -> None:
    _, _, model = world
    paths = shop.write_shop(tmp_path)
    shop.edit(
        paths.embeddings, lambda v: v.with_columns(pl.Series("embedding", np.ones((shop.ITEMS, 5), "f4")))
    )
    with pytest.raises(ContractError, match="width 5"):
        shop.scored(tmp_path, paths, model)
    shop.edit(paths.embeddings, shop.with_string_ids)
    with pytest.raises(ContractError, match="strings"):
        shop.scored(tmp_path, paths, model)


def test_requests_without_labels_cannot_be_learned_from(
    world: tuple[Path, Any, Path], tmp_path: Path
) -> None:
    paths = shop.write_shop(tmp_path)
    shop.edit(paths.requests, lambda r: r.drop("label_click"))
    with pytest.raises(ContractError, match="label_"):
        shop.trained(tmp_path, paths)


def test_no_request_before_until_is_an_error(world: tuple[Path, Any, Path], tmp_path: Path) -> None:
    _, paths, _ = world
    with pytest.raises(ContractError, match="no request before"):
        run(TrainScorer(paths, until=5, config=shop.QUICK), tmp_path / "m", shop.ONE)


def test_training_goes_on_from_yesterday_with_a_new_category(
    world: tuple[Path, Any, Path], tmp_path: Path
) -> None:
    _, _, yesterday = world
    paths = shop.write_shop(tmp_path)
    renamed = pl.when(pl.col("item_id") == 0).then(pl.lit("aaa")).otherwise("category").alias("category")
    shop.edit(paths.items, lambda i: i.with_columns(renamed))
    model = shop.trained(tmp_path, paths, init_from=yesterday)
    words = artefact.read_spec(model).vocabularies["category"]
    assert words[:3] == artefact.read_spec(yesterday).vocabularies["category"] and words[3:] == ("aaa",)
    assert len(shop.scored(tmp_path, paths, model))


def test_cutoffs_later_than_the_first_request_are_refused() -> None:
    ctx: Any = SimpleNamespace(inputs={"users": SimpleNamespace(data_cutoff=101, path="uemb")})
    check_cutoffs(ctx, 101, what="the evaluation")
    with pytest.raises(ContractError, match="up to 101"):
        check_cutoffs(ctx, 100, what="the evaluation")


def test_another_encoder_is_refused() -> None:
    def table(**lineage: str) -> SimpleNamespace:
        return SimpleNamespace(lineage=lineage, path="t")

    model = table(encoder="a" * 64, user_model="u" * 64)
    same: Any = SimpleNamespace(
        inputs={"model": model, "embeddings": table(encoder="a" * 64), "users": table()}
    )
    check_spaces(same)
    other: Any = SimpleNamespace(inputs={"model": model, "embeddings": table(encoder="b" * 64)})
    with pytest.raises(ContractError, match="encoder bbbb"):
        check_spaces(other)


def test_ranks_start_at_one_and_ties_keep_the_order() -> None:
    ranks = rank_within(np.array([0.1, 0.9, 0.9, 0.5]), np.array([0, 0, 0, 1]))
    assert ranks.tolist() == [3, 1, 2, 1]


def test_validation_requests_are_the_latest_and_share_no_time() -> None:
    fit, valid = split_latest(np.array([5, 1, 9, 9, 3, 2, 4, 0, 6, 7]), 0.1)
    assert valid.tolist() == [2, 3] and sorted(fit.tolist() + valid.tolist()) == list(range(10))
    assert len(split_latest(np.full(10, 7), 0.3)[1]) == 0


def test_vocabularies_grow_at_the_end() -> None:
    assert grown_words({"c": ("x", "y")}, {"c": ("y", "a")}) == {"c": ("x", "y", "a")}


def test_a_partitioned_log_and_datetimes_change_no_score(
    world: tuple[Path, Any, Path], tmp_path: Path
) -> None:
    from prerank_tools.data.stage import Partition

    _, _, model = world
    paths = shop.write_shop(tmp_path)
    plain = shop.scored(tmp_path, paths, model)
    shop.edit(paths.requests, lambda r: r.with_columns(pl.from_epoch("timestamp", "s")))
    run(Partition(paths.events, buckets=3), tmp_path / "log", shop.ONE)
    late = pl.read_parquet(paths.requests).filter(pl.col("timestamp").dt.epoch("s") >= shop.CUT)
    late.write_parquet(tmp_path / "dated.parquet")
    stage = Score(replace(paths, events=tmp_path / "log", requests=tmp_path / "dated.parquet"), model=model)
    run(stage, tmp_path / "d.parquet", shop.ONE)
    keys = ["request_id", "rank"]
    dated = pl.read_parquet(tmp_path / "d.parquet").sort(keys)
    assert dated.select(*keys, "item_id").equals(plain.sort(keys).select(*keys, "item_id"))
    np.testing.assert_allclose(dated["score"].to_numpy(), plain.sort(keys)["score"].to_numpy(), rtol=1e-5)


def test_two_tasks_one_of_them_known_only_after_a_click(tmp_path: Path) -> None:
    paths = shop.write_shop(tmp_path)
    liked = pl.col("label_click").list.eval(pl.when(pl.element() == 1).then(pl.element().cum_count() % 2))
    shop.edit(paths.requests, lambda r: r.with_columns(liked.alias("label_like")))
    scores = shop.scored(tmp_path, paths, shop.trained(tmp_path, paths))
    assert scores.columns[-2:] == ["p_click", "p_like"]
    product = (scores["p_click"] * scores["p_like"]).to_numpy()
    np.testing.assert_allclose(scores["score"].to_numpy(), product, rtol=1e-5)


def test_int8_vectors_with_a_scale_read_as_the_floats_they_stand_for(
    world: tuple[Path, Any, Path], tmp_path: Path
) -> None:
    _, _, model = world
    paths = shop.write_shop(tmp_path)
    floats = np.stack(pl.read_parquet(paths.embeddings)["embedding"].to_numpy())
    scale = np.abs(floats).max(axis=1, keepdims=True) / 127
    codes = np.rint(floats / scale).astype(np.int8)
    shop.edit(paths.embeddings, lambda v: v.with_columns(pl.Series("embedding", codes * scale)))
    exact = shop.scored(tmp_path, paths, model)
    shop.edit(paths.embeddings, lambda v: v.with_columns(
        pl.Series("embedding", codes), pl.Series("scale", scale[:, 0].astype(np.float32))))  # fmt: skip
    packed = shop.scored(tmp_path, paths, model, name="packed.parquet")
    np.testing.assert_allclose(packed["score"].to_numpy(), exact["score"].to_numpy(), rtol=2e-3)
