"""`eval sid`, `train quantizer` and `export sid` on a small catalogue whose structure is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import polars as pl
import pytest

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.export.sid import ExportSid
from prerank_tools.export.sid_formats import SidFormat
from prerank_tools.quantizers.codebook import load_codebook
from prerank_tools.quantizers.eval_sids_stage import Sids, check_space
from prerank_tools.quantizers.eval_stage import EvalInputs, evaluate_sids
from prerank_tools.quantizers.fit_stage import SidConfig
from prerank_tools.quantizers.level_means import fit_level_means
from prerank_tools.quantizers.rkmeans import RKMeans
from prerank_tools.quantizers.stage import QuantizeSids
from prerank_tools.quantizers.train_stage import TrainQuantizer, TrainQuantizerConfig
from prerank_tools.run.job import RunOptions, run
from prerank_tools.tables.parquet import write_parquet
from prerank_tools.tables.table import open_table
from prerank_tools.tables.vectors import numpy_to_vectors

TOPICS, ROWS = 8, 400
RUN = RunOptions(workers=1, threads=1)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items around eight topics, the last ten copies of the first; baskets in a topic; SIDs 16 x 8 x 8."""
    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)
    topic = np.arange(ROWS) % TOPICS
    x = rng.normal(size=(TOPICS, 16))[topic] + 0.3 * rng.normal(size=(ROWS, 16))
    x[-10:] = x[:10]
    topic[-10:] = topic[:10]
    ids = pl.Series("item_id", [f"item{row:03d}" for row in range(ROWS)])
    vectors = numpy_to_vectors("embedding", x.astype(np.float32))
    write_parquet(pl.DataFrame([ids, vectors]), folder / "emb.parquet", contract="item_embeddings")
    items = pl.DataFrame([ids, ids.alias("title"), pl.Series("topic", topic)])
    write_parquet(items, folder / "items.parquet", contract="items")
    row = np.arange(1_200)
    events = pl.DataFrame(
        {
            "user_id": row // 3,
            "item_id": ids.gather((row // 3 + TOPICS * rng.integers(0, 40, len(row))) % ROWS),
            "timestamp": 1_700_000_000 + row // 3,
            "basket_id": row // 3,
        }
    )
    write_parquet(events, folder / "events.parquet", contract="events")
    config = SidConfig(codes=(16, 8, 8))
    run(QuantizeSids(folder / "emb.parquet", config=config), folder / "sids", RUN)
    return folder


def inputs(shop: Path, **more: object) -> EvalInputs:
    given = {"embeddings": shop / "emb.parquet", "items": shop / "items.parquet", "categories": ["topic"]}
    return EvalInputs(**(given | {"events": shop / "events.parquet", "queries": 100} | more))  # type: ignore[arg-type]


def rounded(found: dict[str, object]) -> object:
    return json.loads(json.dumps(found), parse_float=lambda number: round(float(number), 12))


def test_everything_at_once(shop: Path) -> None:
    found = evaluate_sids(shop / "sids", inputs(shop))
    assert (found["items"], found["sizes"], found["decoded_by"]) == (400, [16, 8, 8], "codebook")
    assert found["duplicate_floor"] == pytest.approx(10 / 400)
    assert found["collision_above_floor"] == pytest.approx(found["collision_rate"] - 10 / 400)
    assert found["category"]["topic"]["depth_1"]["purity"] > 0.9
    assert found["category"]["topic"]["depth_1"]["purity_by_chance"] < 0.3
    assert found["together"]["depth_1"]["lift"] > 4  # eight topics, so at most 8
    assert found["neighbour_recall_low"] < found["neighbour_recall"] < found["neighbour_recall_high"]
    assert found["level_1"]["used"] == 16
    assert set(found["verdict"]["1"]) == {"verdict", "because", "advice"}


def test_reconstruction_is_that_of_the_codebook(shop: Path) -> None:
    found = evaluate_sids(shop / "sids", inputs(shop))
    book = RKMeans.from_codebook(load_codebook(shop / "sids" / "codebook"))
    x = pl.read_parquet(shop / "emb.parquet")["embedding"].to_numpy()
    error = ((x - book.decode(book.encode(x))) ** 2).sum() / (x**2).sum()
    assert found["relative_error"] == pytest.approx(float(error), rel=1e-5)


@pytest.mark.parametrize("format", get_args(SidFormat))
def test_an_export_is_judged_as_its_source(shop: Path, tmp_path: Path, format: str) -> None:
    run(ExportSid(shop / "sids", format=format), tmp_path / "out", RUN)  # type: ignore[arg-type]
    source = evaluate_sids(shop / "sids", inputs(shop))
    foreign = evaluate_sids(tmp_path / "out", inputs(shop, codebook=shop / "sids" / "codebook"))
    assert rounded(foreign) == rounded(source)  # the order of the items is the format's own
    unknown = evaluate_sids(tmp_path / "out", inputs(shop))
    assert unknown["decoded_by"].startswith("mean of each code")
    assert unknown["relative_error"] == pytest.approx(source["relative_error"], rel=0.05)


def test_level_means_of_rkmeans_codes_never_do_worse() -> None:
    x = np.random.default_rng(1).normal(size=(500, 8)).astype(np.float32)
    book = RKMeans(sizes=(8, 8)).fit(x)
    codes = book.encode(x)
    means = fit_level_means(lambda: iter([x[:300], x[300:]]), codes, (8, 8))
    assert ((x - means.decode(codes)) ** 2).sum() <= ((x - book.decode(codes)) ** 2).sum() * 1.0001


def test_a_suffix_parts_items_but_is_no_level(shop: Path, tmp_path: Path) -> None:
    stage = QuantizeSids(shop / "emb.parquet", codebook=shop / "sids" / "codebook", collisions="suffix")
    run(stage, tmp_path / "suffixed", RUN)
    found = evaluate_sids(tmp_path / "suffixed", EvalInputs())
    assert found["sizes"] == [16, 8, 8] and found["collision_rate"] > 0
    assert found["collision_rate_with_suffix"] == 0


def test_items_that_were_not_fitted_are_measured_apart(shop: Path, tmp_path: Path) -> None:
    half = pl.read_parquet(shop / "emb.parquet").head(200)
    write_parquet(half, tmp_path / "half.parquet", contract="item_embeddings")
    config = SidConfig(codes=(16, 8, 8))
    run(QuantizeSids(tmp_path / "half.parquet", config=config), tmp_path / "half", RUN)
    stage = QuantizeSids(shop / "emb.parquet", codebook=tmp_path / "half" / "codebook")
    run(stage, tmp_path / "sids", RunOptions(workers=1, threads=1, gate="warn"))
    found = evaluate_sids(tmp_path / "sids", inputs(shop, fitted_on=tmp_path / "half.parquet"))
    assert found["not_fitted"]["items"] == 200
    assert found["not_fitted"]["relative_error"] > found["relative_error"]


def test_two_codebooks_compared(shop: Path, tmp_path: Path) -> None:
    stage = QuantizeSids(shop / "emb.parquet", config=SidConfig(codes=(16, 8, 8), quantizer="random-hash"))
    run(stage, tmp_path / "random", RUN)
    found = evaluate_sids(shop / "sids", inputs(shop), against=tmp_path / "random")
    assert found["compare"]["neighbour_recall"]["better"] == "A"
    assert found["compare"]["relative_error"]["better"] == "A"
    assert found["B"]["together"]["depth_1"]["lift"] == pytest.approx(1, abs=0.5)


def test_what_does_not_fit_is_refused(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs --items"):
        evaluate_sids(shop / "sids", EvalInputs(categories=["topic"]))
    with pytest.raises(ContractError, match="no column `colour`"):
        evaluate_sids(shop / "sids", inputs(shop, categories=["colour"]))
    book = RKMeans(sizes=(4, 4, 4)).fit(np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32))
    book.to_codebook().save(tmp_path / "other")
    with pytest.raises(ContractError, match="do not fit the codebook"):
        evaluate_sids(shop / "sids", inputs(shop, codebook=tmp_path / "other"))


def test_another_codebook_of_the_same_sizes_is_refused(shop: Path, tmp_path: Path) -> None:
    refit = SidConfig(codes=(16, 8, 8), seed=1)
    run(QuantizeSids(shop / "emb.parquet", config=refit), tmp_path / "refit", RUN)
    with pytest.raises(ContractError, match="not the codebook of"):
        evaluate_sids(shop / "sids", inputs(shop, codebook=tmp_path / "refit" / "codebook"))


def test_vectors_of_another_space_are_refused(shop: Path, tmp_path: Path) -> None:
    emb = pl.read_parquet(shop / "emb.parquet")
    narrow = numpy_to_vectors("embedding", emb["embedding"].to_numpy()[:, :8].copy())
    write_parquet(emb.with_columns(narrow), tmp_path / "narrow.parquet", contract="item_embeddings")
    with pytest.raises(ContractError, match="another encoder"):
        evaluate_sids(shop / "sids", inputs(shop, embeddings=tmp_path / "narrow.parquet"))
    book = load_codebook(shop / "sids" / "codebook").with_lineage({"encoder": "one"})
    table = replace(open_table(shop / "emb.parquet", "item_embeddings"), lineage={"encoder": "two"})
    sids = replace(Sids.open(shop / "sids", None), encoder=book.lineage["encoder"])
    with pytest.raises(ContractError, match="another encoder"):
        check_space(sids, table)


@pytest.mark.parametrize(
    "kind", ["rkmeans", "balanced-rkmeans", "pq", "random-hash", "rqvae", "rkmeans-plus", "rkmeans-fsq"]
)
def test_every_kind_is_trained_and_assigns(shop: Path, tmp_path: Path, kind: str) -> None:
    learned = kind in ("rqvae", "rkmeans-plus", "rkmeans-fsq")
    knobs: dict[str, object] = {"network": {"train": {"epochs": 2, "batch_size": 100}}} if learned else {}
    config = TrainQuantizerConfig(quantizer=kind, levels=2, codes=8, **knobs)  # type: ignore[arg-type]
    result = run(TrainQuantizer(shop / "emb.parquet", config=config), tmp_path / "book", RUN)
    assert result.manifest is not None and result.manifest.quality["kind"] == kind
    stage = QuantizeSids(shop / "emb.parquet", codebook=tmp_path / "book")
    assert (
        run(stage, tmp_path / "sids", RUN).manifest.lineage["codebook"] == result.manifest.lineage["codebook"]
    )  # type: ignore[union-attr]
    assert evaluate_sids(tmp_path / "sids", inputs(shop))["sizes"] == [8, 8]


def test_training_again_gives_the_same_codebook_and_goes_on_from_one(shop: Path, tmp_path: Path) -> None:
    network = {"train": {"epochs": 2, "batch_size": 100}, "hidden": [16], "code_dim": 4}
    config = TrainQuantizerConfig(quantizer="rqvae", levels=2, codes=8, network=network)
    prints = []
    for name in ("one", "two"):
        run(TrainQuantizer(shop / "emb.parquet", config=config), tmp_path / name, RUN)
        prints.append(load_codebook(tmp_path / name).fingerprint)
    assert prints[0] == prints[1]
    stage = TrainQuantizer(shop / "emb.parquet", init_from=tmp_path / "one", config=config)
    run(stage, tmp_path / "next", RUN)
    assert load_codebook(tmp_path / "next").fingerprint != prints[0]
    plain = TrainQuantizer(shop / "emb.parquet", init_from=tmp_path / "one")
    with pytest.raises(UsageError, match="kind rqvae, to train rkmeans"):
        run(plain, tmp_path / "no", RUN)


def test_wrong_knobs_are_named() -> None:
    with pytest.raises(ValueError, match="rkmeans has no network"):
        TrainQuantizerConfig(network={"code_dim": 3})
    with pytest.raises(ValueError, match="rqvae has no key beam"):
        TrainQuantizerConfig(quantizer="rqvae", beam=4)
    with pytest.raises(ValueError, match="code_dims"):
        TrainQuantizerConfig(quantizer="rqvae", network={"code_dims": 3})
