"""`quantize sid`: fitted once, frozen after; published SIDs stay; faults are told; small catalogues work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from prerank_tools.errors import ContractError, GateError, UsageError
from prerank_tools.quantizers.assign import assign_exact
from prerank_tools.quantizers.codebook import load_codebook
from prerank_tools.quantizers.fit_stage import COPIES, SidConfig
from prerank_tools.quantizers.stage import QuantizeSids
from prerank_tools.run.job import Result, RunOptions, run
from prerank_tools.tables.table import open_table
from prerank_tools.tables.vectors import numpy_to_vectors, vectors_to_numpy

SMALL = SidConfig(codes=8, levels=2, iterations=5)


def vectors(rows: int, dims: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x_ND = rng.standard_normal((9, dims))[rng.integers(0, 9, rows)] + 0.4 * rng.standard_normal((rows, dims))
    return x_ND.astype(np.float32)


def write(path: Path, x_ND: np.ndarray, ids: Any = None, **columns: Any) -> Path:
    """A table of item embeddings without a manifest, as a user would write it."""
    ids = [f"i{n:05d}" for n in range(len(x_ND))] if ids is None else ids
    frame = pl.DataFrame({"item_id": ids, **columns}).with_columns(numpy_to_vectors("embedding", x_ND))
    frame.write_parquet(path)
    return path


def go(stage: QuantizeSids, out: Path, **options: Any) -> Result:
    return run(stage, out, RunOptions(workers=1, threads=1, **options))


def sids(out: Path) -> dict[Any, str]:
    frame = open_table(out, "item_sids").read()
    return dict(zip(frame["item_id"].to_list(), frame["sid"].to_list(), strict=True))


def quality(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "manifest.json").read_text())["quality"]
    return found


def test_fit_assign_and_publish(tmp_path: Path) -> None:
    x_ND = vectors(400)
    go(QuantizeSids(write(tmp_path / "emb.parquet", x_ND), config=SMALL), tmp_path / "sid")
    codebook = load_codebook(tmp_path / "sid" / "codebook")
    frame = pl.read_parquet(tmp_path / "sid" / "data" / "part-00000.parquet")
    assert frame.schema == {"item_id": pl.String, "codes": pl.Array(pl.UInt16, 2), "sid": pl.String}
    codes_NL = assign_exact(x_ND, codebook.codebooks)
    np.testing.assert_array_equal(vectors_to_numpy(frame["codes"]), codes_NL)
    assert frame["sid"][0] == f"<a_{codes_NL[0, 0]}><b_{codes_NL[0, 1]}>"
    manifest = json.loads((tmp_path / "sid" / "manifest.json").read_text())
    assert manifest["lineage"] == {"codebook": codebook.fingerprint}
    found = manifest["quality"]
    assert found["collision_rate"] == pytest.approx(1 - len(np.unique(codes_NL, axis=0)) / 400)
    error = x_ND - sum(codebook.codebooks[n][codes_NL[:, n]] for n in (0, 1))
    assert found["relative_error"] == pytest.approx((error**2).sum() / (x_ND**2).sum(), rel=1e-4)


def test_a_second_night_keeps_every_sid(tmp_path: Path) -> None:
    x_ND = vectors(400)
    go(QuantizeSids(write(tmp_path / "one.parquet", x_ND[:350]), config=SMALL), tmp_path / "one")
    two = write(tmp_path / "two.parquet", x_ND)
    go(QuantizeSids(two, codebook=tmp_path / "one" / "codebook"), tmp_path / "two")
    before, after = sids(tmp_path / "one"), sids(tmp_path / "two")
    assert {item: after[item] for item in before} == before
    assert len(after) == 400
    for name in ("config.json", "model.safetensors"):
        stored = [(tmp_path / night / "codebook" / name).read_bytes() for night in ("one", "two")]
        assert stored[0] == stored[1]
    assert not quality(tmp_path / "two")["codebook"]["fitted_now"]


def test_the_output_folder_may_stand_for_its_codebook(tmp_path: Path) -> None:
    emb = write(tmp_path / "emb.parquet", vectors(200))
    go(QuantizeSids(emb, config=SMALL), tmp_path / "sid")
    assert go(QuantizeSids(emb, codebook=tmp_path / "sid"), tmp_path / "again").status == "done"
    assert sids(tmp_path / "again") == sids(tmp_path / "sid")


def test_an_edited_item_keeps_its_sid_unless_told(tmp_path: Path) -> None:
    x_ND = vectors(300)
    go(QuantizeSids(write(tmp_path / "one.parquet", x_ND), config=SMALL), tmp_path / "one")
    x_ND[7] = x_ND[np.linalg.norm(x_ND - x_ND[7], axis=1).argmax()]  # item 7 becomes quite another
    two = write(tmp_path / "two.parquet", x_ND)
    night = QuantizeSids(two, codebook=tmp_path / "one", previous=tmp_path / "one")
    go(night, tmp_path / "kept")
    go(replace(night, reassign_changed=True), tmp_path / "moved")
    assert sids(tmp_path / "kept") == sids(tmp_path / "one")
    assert quality(tmp_path / "kept")["published"] == {"kept": 300, "moved": 0, "new": 0, "edited": 1}
    moved = sids(tmp_path / "moved")
    assert [item for item in moved if moved[item] != sids(tmp_path / "one")[item]] == ["i00007"]


def test_suffixes_are_stable_and_a_freed_one_is_not_given_again(tmp_path: Path) -> None:
    same_ND = np.repeat(vectors(3, seed=5), 3, axis=0)  # three groups of three equal items
    config = SidConfig(codes=2, levels=2, iterations=3)
    one = write(tmp_path / "one.parquet", same_ND, list(range(9)))
    stage = QuantizeSids(one, collisions="suffix", config=config)
    go(stage, tmp_path / "one")
    first = sids(tmp_path / "one")
    assert len(set(first.values())) == 9
    assert first[0].endswith("<c_0>")
    # Item 2, the last of its SID, is delisted; a new item 9 with the same vector must not take its suffix.
    rows = [n for n in range(9) if n != 2]
    two = write(tmp_path / "two.parquet", same_ND[[*rows, 2]], [*rows, 9])
    go(replace(stage, embeddings=two, codebook=tmp_path / "one", previous=tmp_path / "one"), tmp_path / "two")
    second = sids(tmp_path / "two")
    assert {item: second[item] for item in rows} == {item: first[item] for item in rows}
    assert second[9] not in first.values()
    # The mark survives a night without any item of that SID.
    three = write(tmp_path / "three.parquet", same_ND[[2]], [10])
    go(
        replace(stage, embeddings=three, codebook=tmp_path / "two", previous=tmp_path / "two"),
        tmp_path / "three",
    )
    assert sids(tmp_path / "three")[10] not in {*first.values(), *second.values()}


@pytest.mark.parametrize("policy", ["capacity", "sinkhorn", "optimal"])
def test_moving_policies_move_last_codes_only_and_spare_what_is_published(
    tmp_path: Path, policy: Any
) -> None:
    x_ND = vectors(120)
    config = SidConfig(codes=8, levels=2, iterations=5, capacity=2)
    plain = QuantizeSids(write(tmp_path / "emb.parquet", x_ND), config=config)
    go(plain, tmp_path / "plain")
    stage = replace(plain, codebook=tmp_path / "plain", collisions=policy)
    go(stage, tmp_path / "moved", gate="warn")
    before, after = (
        vectors_to_numpy(open_table(tmp_path / name, "item_sids").read()["codes"])
        for name in ("plain", "moved")
    )
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert quality(tmp_path / "moved")["sids"] > quality(tmp_path / "plain")["sids"]
    go(replace(stage, previous=tmp_path / "moved"), tmp_path / "again", gate="warn")
    assert sids(tmp_path / "again") == sids(tmp_path / "moved")


def test_the_floor_of_duplicates_is_reported_and_listed(tmp_path: Path) -> None:
    x_ND = vectors(60)
    x_ND[10] = x_ND[11] = x_ND[3]
    x_ND[20] = x_ND[21]
    emb = write(tmp_path / "emb.parquet", x_ND, content_hash=[f"h{n // 2}" for n in range(60)])
    go(QuantizeSids(emb, config=SMALL), tmp_path / "sid")
    found = quality(tmp_path / "sid")
    assert found["duplicate_floor"] == pytest.approx(3 / 60)
    assert found["content_floor"] == pytest.approx(0.5)
    assert found["collision_above_floor"] == pytest.approx(found["collision_rate"] - 3 / 60)
    groups = pl.read_parquet(tmp_path / "sid" / "duplicates" / "data" / "part-00000.parquet")
    assert groups["item_id"].to_list() == ["i00003", "i00010", "i00011", "i00020", "i00021"]
    assert groups["group"].to_list() == [0, 0, 0, 1, 1]


def test_parts_workers_and_threads_change_no_byte(tmp_path: Path) -> None:
    x_ND = vectors(90)
    whole = write(tmp_path / "whole.parquet", x_ND)
    parts = tmp_path / "parts"
    parts.mkdir()
    for part in range(3):
        rows = slice(30 * part, 30 * part + 30)
        write(parts / f"part-{part:05d}.parquet", x_ND[rows], [f"i{n:05d}" for n in range(90)][rows])
    go(QuantizeSids(whole, config=SMALL), tmp_path / "a")
    run(QuantizeSids(parts, config=SMALL), tmp_path / "b", RunOptions(workers=2, threads=1))
    run(QuantizeSids(parts, config=SMALL), tmp_path / "c", RunOptions(workers=1, threads=2))
    assert sids(tmp_path / "a") == sids(tmp_path / "b")
    for name in ("part-00000", "part-00001", "part-00002"):
        made = [(tmp_path / out / "data" / f"{name}.parquet").read_bytes() for out in ("b", "c")]
        assert made[0] == made[1]
    stored = [(tmp_path / out / "codebook" / "model.safetensors").read_bytes() for out in ("a", "b", "c")]
    assert stored[0] == stored[1] == stored[2]


@pytest.mark.parametrize("dtype", [np.int8, np.float16])
def test_narrow_vectors_and_int_ids(tmp_path: Path, dtype: type) -> None:
    x_ND = (20 * vectors(200)).astype(dtype)
    emb = write(tmp_path / "emb.parquet", x_ND, np.arange(200)[::-1] + 5_000_000_000)
    go(QuantizeSids(emb, config=SMALL), tmp_path / "sid")
    frame = open_table(tmp_path / "sid", "item_sids").read()
    assert frame["item_id"].to_list() == sorted(frame["item_id"].to_list())
    codes_NL = assign_exact(x_ND[::-1], load_codebook(tmp_path / "sid" / "codebook").codebooks)
    np.testing.assert_array_equal(vectors_to_numpy(frame["codes"]), codes_NL)


def test_the_scale_of_int8_rows_counts(tmp_path: Path) -> None:
    x_ND = vectors(200)
    scale_N = np.abs(x_ND).max(axis=1) / 127
    narrow_ND = np.round(x_ND / scale_N[:, None]).astype(np.int8)
    go(QuantizeSids(write(tmp_path / "wide.parquet", x_ND), config=SMALL), tmp_path / "wide")
    narrow = write(tmp_path / "narrow.parquet", narrow_ND, scale=scale_N.astype(np.float32))
    go(QuantizeSids(narrow, codebook=tmp_path / "wide"), tmp_path / "narrow", gate="warn")
    wide, same = sids(tmp_path / "wide"), sids(tmp_path / "narrow")
    assert np.mean([wide[item] == same[item] for item in wide]) > 0.95


@pytest.mark.parametrize(("rows", "codes"), [(5, 2), (81, 16), (1_741, 256)])
def test_small_catalogues_work_by_default(tmp_path: Path, rows: int, codes: int) -> None:
    config = SidConfig(iterations=3)
    go(QuantizeSids(write(tmp_path / "emb.parquet", vectors(rows)), config=config), tmp_path / "sid")
    assert quality(tmp_path / "sid")["codebook"]["sizes"] == [codes] * 3
    assert len(sids(tmp_path / "sid")) == rows


def test_asked_for_more_codes_than_items(tmp_path: Path) -> None:
    emb = write(tmp_path / "emb.parquet", vectors(81))
    with pytest.raises(ContractError, match="256 codes a level, but only 81 vectors") as caught:
        go(QuantizeSids(emb, config=SidConfig(codes=256)), tmp_path / "sid")
    assert "16" in caught.value.hint
    assert not (tmp_path / "sid").exists()


def test_unusable_rows_are_set_aside(tmp_path: Path) -> None:
    x_ND = vectors(100)
    x_ND[3] = 0
    x_ND[4, 1] = np.nan
    emb = write(tmp_path / "emb.parquet", x_ND)
    with pytest.raises(ContractError, match="2 of 100 rows"):
        go(QuantizeSids(emb, config=SMALL), tmp_path / "sid")
    go(QuantizeSids(emb, config=SMALL), tmp_path / "sid", max_bad=0.05)
    assert len(sids(tmp_path / "sid")) == 98
    aside = pl.read_parquet(tmp_path / "sid" / "quarantine" / "part-00000.parquet")
    assert aside["item_id"].to_list() == ["i00003", "i00004"]


def test_another_width_is_refused(tmp_path: Path) -> None:
    go(QuantizeSids(write(tmp_path / "a.parquet", vectors(100)), config=SMALL), tmp_path / "sid")
    other = write(tmp_path / "b.parquet", vectors(100, dims=7))
    with pytest.raises(ContractError, match="`embedding` is 7 wide, the codebook was fitted on 12"):
        go(QuantizeSids(other, codebook=tmp_path / "sid"), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    emb = write(tmp_path / "emb.parquet", vectors(100))
    go(QuantizeSids(emb, config=SMALL), tmp_path / "sid")
    codebook = load_codebook(tmp_path / "sid" / "codebook").with_lineage({"encoder": "minilm-abc"})
    codebook.save(tmp_path / "foreign")
    table = replace(open_table(emb, "item_embeddings"), lineage={"encoder": "tfidf-xyz"})
    from prerank_tools.quantizers.stage import check_space

    with pytest.raises(ContractError, match="made by encoder tfidf-xyz, the codebook was fitted on"):
        check_space(codebook, table)
    check_space(codebook, replace(table, lineage={"encoder": "minilm-abc"}))


def test_ids_of_another_type_are_refused(tmp_path: Path) -> None:
    go(QuantizeSids(write(tmp_path / "a.parquet", vectors(90)), config=SMALL), tmp_path / "sid")
    numbers = write(tmp_path / "b.parquet", vectors(90), np.arange(90))
    with pytest.raises(ContractError, match="`item_id` is String"):
        go(QuantizeSids(numbers, codebook=tmp_path / "sid", previous=tmp_path / "sid"), tmp_path / "no")


@pytest.mark.parametrize(
    "words",
    [
        {"codebook": Path("x"), "match": Path("x")},
        {"until": 5},
        {"events": Path("x")},
        {"reassign_changed": True},
    ],
)
def test_flags_that_contradict_each_other(words: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        QuantizeSids(Path("emb"), **words)._check_flags()


def test_drifted_items_hold_the_publish(tmp_path: Path) -> None:
    x_ND = vectors(600)
    go(QuantizeSids(write(tmp_path / "a.parquet", x_ND), config=SMALL), tmp_path / "one")
    same = write(tmp_path / "b.parquet", np.concatenate([x_ND, vectors(660)[600:]]))
    night = QuantizeSids(same, codebook=tmp_path / "one", previous=tmp_path / "one")
    go(night, tmp_path / "two")
    assert quality(tmp_path / "two")["drift"]["items"] == 60
    other_ND = np.concatenate([x_ND, 3 * vectors(60, seed=9)])
    other = replace(night, embeddings=write(tmp_path / "c.parquet", other_ND))
    with pytest.raises(GateError, match="refit advised: 60 new items"):
        go(other, tmp_path / "three")
    assert not (tmp_path / "three").exists()
    go(other, tmp_path / "three", gate="warn")
    gates = json.loads((tmp_path / "three" / "manifest.json").read_text())["gates"]
    assert not all(gate["passed"] for gate in gates)


def test_a_refit_reports_churn_and_matching_lowers_it(tmp_path: Path) -> None:
    x_ND = vectors(600)
    go(QuantizeSids(write(tmp_path / "a.parquet", x_ND), config=SMALL), tmp_path / "one")
    more = write(tmp_path / "b.parquet", np.concatenate([x_ND, vectors(630)[600:]]))
    refit = QuantizeSids(more, previous=tmp_path / "one", config=SMALL.model_copy(update={"seed": 3}))
    go(refit, tmp_path / "refit")
    go(replace(refit, match=tmp_path / "one"), tmp_path / "matched")
    plain, matched = (quality(tmp_path / name)["churn"] for name in ("refit", "matched"))
    assert plain["items"] == 600
    assert plain["level_1"] > 0.5 > matched["level_1"]
    assert matched["level_1_2"] < plain["level_1_2"]
    assert quality(tmp_path / "refit")["relative_error"] == quality(tmp_path / "matched")["relative_error"]


def test_until_fits_on_items_known_by_then(tmp_path: Path) -> None:
    x_ND = vectors(200)
    emb = write(tmp_path / "emb.parquet", x_ND)
    events = pl.DataFrame(
        {
            "user_id": ["u"] * 200,
            "item_id": [f"i{n:05d}" for n in range(200)],
            "timestamp": range(1_000, 1_200),
        }
    )
    events.write_parquet(tmp_path / "events.parquet")
    stage = QuantizeSids(emb, events=tmp_path / "events.parquet", until=1_120, config=SMALL)
    go(stage, tmp_path / "sid")
    early = write(tmp_path / "early.parquet", x_ND[:120])
    go(QuantizeSids(early, config=SMALL), tmp_path / "early")
    codebooks = [load_codebook(tmp_path / name / "codebook") for name in ("sid", "early")]
    assert codebooks[0].fingerprint == codebooks[1].fingerprint
    manifest = json.loads((tmp_path / "sid" / "manifest.json").read_text())
    assert manifest["data_cutoff"] == 1_120
    assert manifest["outputs"]["rows"] == 200
    # The cutoff of a fit travels with its codebook.
    go(QuantizeSids(emb, codebook=tmp_path / "sid"), tmp_path / "next", gate="warn")
    assert json.loads((tmp_path / "next" / "manifest.json").read_text())["data_cutoff"] == 1_120


def test_the_sample_does_not_depend_on_order_or_parts(tmp_path: Path) -> None:
    x_ND = vectors(300)
    config = SMALL.model_copy(update={"sample_rows": 100})
    order_N = np.random.default_rng(0).permutation(300)
    one = write(tmp_path / "a.parquet", x_ND)
    two = write(tmp_path / "b.parquet", x_ND[order_N], [f"i{n:05d}" for n in order_N])
    go(QuantizeSids(one, config=config), tmp_path / "a")
    go(QuantizeSids(two, config=config), tmp_path / "b")
    assert sids(tmp_path / "a") == sids(tmp_path / "b")
    assert quality(tmp_path / "a")["codebook"]["fitted_on"] == 100


def test_the_sample_of_a_fit_stays_under_its_memory_ceiling(tmp_path: Path) -> None:
    emb = write(tmp_path / "emb.parquet", vectors(600, dims=256))
    rows = (1 << 20) // (4 * 256 * COPIES)
    go(QuantizeSids(emb, config=SMALL.model_copy(update={"fit_memory_mb": 1})), tmp_path / "sid")
    assert quality(tmp_path / "sid")["codebook"]["fitted_on"] == rows < 600


def test_refined_codebooks_with_a_beam_are_frozen_like_any(tmp_path: Path) -> None:
    emb = write(tmp_path / "emb.parquet", vectors(300))
    plain = SidConfig(codes=8, levels=3, iterations=5)
    go(QuantizeSids(emb, config=plain), tmp_path / "plain")
    go(QuantizeSids(emb, config=plain.model_copy(update={"beam": 3, "refine": 10})), tmp_path / "sid")
    go(QuantizeSids(emb, codebook=tmp_path / "sid", previous=tmp_path / "sid"), tmp_path / "again")
    assert sids(tmp_path / "again") == sids(tmp_path / "sid")
    assert quality(tmp_path / "sid")["relative_error"] < quality(tmp_path / "plain")["relative_error"]


@pytest.mark.parametrize("quantizer", ["balanced-rkmeans", "pq", "random-hash"])
def test_other_quantizers_run_the_same_way(tmp_path: Path, quantizer: Any) -> None:
    emb = write(tmp_path / "emb.parquet", vectors(300))
    config = SidConfig(codes=8, levels=3, iterations=5, quantizer=quantizer)
    go(QuantizeSids(emb, config=config), tmp_path / "sid")
    go(QuantizeSids(emb, codebook=tmp_path / "sid"), tmp_path / "again")
    assert sids(tmp_path / "again") == sids(tmp_path / "sid")


def test_knobs_that_a_quantizer_lacks_are_refused(tmp_path: Path) -> None:
    emb = write(tmp_path / "emb.parquet", vectors(100))
    with pytest.raises(UsageError, match="pq has no `beam`"):
        go(QuantizeSids(emb, config=SidConfig(codes=8, quantizer="pq", beam=4)), tmp_path / "sid")


def test_chinese_titles_pass_through(tmp_path: Path, chinese_items: pl.DataFrame) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    titles = chinese_items["title"].to_list()
    x_ND = TfidfVectorizer(analyzer="char", ngram_range=(1, 2)).fit_transform(titles).toarray()
    emb = write(tmp_path / "emb.parquet", x_ND.astype(np.float32), chinese_items["item_id"].to_list())
    go(QuantizeSids(emb), tmp_path / "sid")
    found = sids(tmp_path / "sid")
    assert set(found) == set(chinese_items["item_id"])
    product = dict(zip(chinese_items["item_id"], chinese_items["product"], strict=True))
    same = [(a, b) for a in found for b in found if a < b and product[a] == product[b]]
    other = [(a, b) for a in found for b in found if a < b and product[a] != product[b]]
    shared = [np.mean([found[a][:5] == found[b][:5] for a, b in pairs]) for pairs in (same, other)]
    assert shared[0] > 2 * shared[1]
