"""`train encoder` end to end on tiny models: what learns, what is refused, what `embed items` makes of it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from prerank_tools.encoders.moco import Scl
from prerank_tools.encoders.pretrain import TrainEncoderConfig
from prerank_tools.encoders.pretrain_stage import TrainEncoder
from prerank_tools.encoders.stage import EmbedItems
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.run.job import RunOptions, run
from prerank_tools.tables.vectors import vectors_to_numpy

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
THINGS = ("shirt", "shoe", "hat", "bag", "watch", "dress", "sock", "belt")
OPTIONS = RunOptions(threads=1, workers=1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLOURS, *THINGS, "a", "##x", "zi", "##gg", "##y"]
    (folder / "words.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "words.txt"), model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(image_size=8, patch_size=4, intermediate_size=32, **shape)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 items; a query names the thing it wants by another word order, its picture has the colour."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [(c, t) for c in range(len(COLOURS)) for t in range(len(THINGS))]
    titles = [f"{COLOURS[c]} {THINGS[t]}" for c, t in rows]
    pl.DataFrame(
        {
            "item_id": [f"i{n:02d}" for n in range(len(rows))],
            "title": titles,
            "brand": ["ziggy" if n % 2 else "ax" for n in range(len(rows))],
            "thing": [THINGS[t] for _, t in rows],
            "image": [picture(c, t) for c, t in rows],
        }
    ).write_parquet(folder / "items.parquet")
    pl.DataFrame(
        {
            "query_text": [f"a {THINGS[t]} {COLOURS[c]}" for c, t in rows],
            "item_id": [f"i{n:02d}" for n in range(len(rows))],
            "hard_negatives": [[f"i{(n + 1) % len(rows):02d}"] if n % 3 else [] for n in range(len(rows))],
            "timestamp": list(range(100, 100 + len(rows))),
        }
    ).write_parquet(folder / "pairs.parquet")
    return folder


def picture(colour: int, thing: int) -> bytes:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :, colour % 3] = 255 if colour < 3 else 90
    pixels[thing] = 255 - 20 * thing
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def config(**knobs: Any) -> TrainEncoderConfig:
    training = {"epochs": 12, "batch_size": 16, "lr": 0.01, "warmup_steps": 0, **knobs.pop("training", {})}
    shape = {"dim": 8, "hidden": 16, "heads": 2, **knobs.pop("fusion", {})}
    return TrainEncoderConfig(training=training, fusion=shape, valid_share=0.2, **knobs)


def train_on(tables: Path, out: Path, **words: Any) -> dict[str, Any]:
    stage = TrainEncoder(tables / "pairs.parquet", tables / "items.parquet", **words)
    result = run(stage, out, OPTIONS)
    assert result.manifest is not None
    return dict(result.manifest.quality)


def embeddings(tables: Path, model: Path, out: Path) -> np.ndarray:
    run(EmbedItems(tables / "items.parquet", model=str(model)), out, OPTIONS)
    frame = pl.read_parquet(out / "data" / "part-00000.parquet")
    assert frame["item_id"].to_list() == sorted(frame["item_id"].to_list())
    return vectors_to_numpy(frame["embedding"])


def test_frozen_features_train_a_fusion_that_embed_items_loads(
    tables: Path, text_model: Path, image_model: Path, tmp_path: Path
) -> None:
    quality = train_on(
        tables, tmp_path / "m", model=str(text_model), image_model=str(image_model), config=config()
    )
    assert quality["held_out_pairs"] == 9 and quality["pairs"] == 39
    lines = [json.loads(line) for line in (tmp_path / "m" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] and "triplet" in lines[0] and "nce_bank" in lines[0]
    x_ND = embeddings(tables, tmp_path / "m", tmp_path / "e")
    assert x_ND.shape == (48, 8)
    np.testing.assert_allclose(np.linalg.norm(x_ND, axis=1), 1, atol=1e-5)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {"config.json", "model.safetensors", "manifest.json", "metrics.jsonl", "text", "image"}


def test_text_alone_trains_and_embeds(tables: Path, text_model: Path, tmp_path: Path) -> None:
    train_on(tables, tmp_path / "m", model=str(text_model), config=config())
    assert embeddings(tables, tmp_path / "m", tmp_path / "e").shape == (48, 8)


@pytest.mark.parametrize("how", ["last", "lora", "full"])
def test_towers_learn_as_far_as_asked(
    tables: Path, text_model: Path, image_model: Path, tmp_path: Path, how: str
) -> None:
    knobs = config(tune=how, last_layers=1, tower_lr=1.0, training={"epochs": 2})
    train_on(tables, tmp_path / "m", model=str(text_model), image_model=str(image_model), config=knobs)
    before, after = (load_file(str(f / "model.safetensors")) for f in (text_model, tmp_path / "m" / "text"))
    assert set(after) <= set(before)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    in_layer = {n: any(f"layer.{n}." in name for name in moved) for n in (0, 1)}
    assert in_layer == {0: how != "last", 1: True}
    assert ("embeddings.word_embeddings.weight" in moved) == (how == "full")
    pictures = [load_file(str(f / "model.safetensors")) for f in (image_model, tmp_path / "m" / "image")]
    assert any(not torch.equal(pictures[0][name], pictures[1][name]) for name in pictures[1])
    assert embeddings(tables, tmp_path / "m", tmp_path / "e").shape == (48, 8)


def test_extra_vocab_becomes_tokens_that_start_from_their_pieces(
    tables: Path, text_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    still = config(tune="last", last_layers=1, extra_vocab=("brand",), training={"epochs": 1, "lr": 1e-9})
    quality = train_on(
        tables, tmp_path / "m", model=str(text_model), template="{title} {brand}", config=still
    )
    assert quality["new_words"] == 2  # ax = a ##x, ziggy = zi ##gg ##y
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m" / "text")
    assert tokenizer.tokenize("ziggy red ax") == ["ziggy", "red", "ax"]
    table = "embeddings.word_embeddings.weight"
    old, new = (load_file(str(f / "model.safetensors"))[table] for f in (text_model, tmp_path / "m" / "text"))
    assert torch.equal(new[: len(old)], old)
    known = BertTokenizerFast.from_pretrained(text_model).get_vocab()
    pieces = old[[known["zi"], known["##gg"], known["##y"]]].mean(0)
    row = tokenizer.get_vocab()["ziggy"]
    torch.testing.assert_close(new[row], pieces, atol=1e-5, rtol=0)

    moving = config(tune="last", last_layers=1, tower_lr=1.0, extra_vocab=("brand",), training={"epochs": 2})
    train_on(tables, tmp_path / "n", model=str(text_model), template="{title} {brand}", config=moving)
    learnt = load_file(str(tmp_path / "n" / "text" / "model.safetensors"))[table]
    assert torch.equal(learnt[: len(old)], old) and not torch.equal(learnt[row], new[row])
    assert embeddings(tables, tmp_path / "n", tmp_path / "e").shape == (48, 8)


def test_extra_vocab_needs_a_tower_that_learns(tables: Path, text_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="need a text model that learns"):
        train_on(tables, tmp_path / "m", model=str(text_model), config=config(extra_vocab=("brand",)))


def test_init_from_goes_on_from_yesterday(tables: Path, text_model: Path, tmp_path: Path) -> None:
    train_on(tables, tmp_path / "m", model=str(text_model), config=config())
    still = config(training={"epochs": 1, "lr": 1e-12, "weight_decay": 0})
    train_on(tables, tmp_path / "n", init_from=tmp_path / "m", config=still)
    first, second = (load_file(str(tmp_path / name / "model.safetensors")) for name in "mn")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-6, rtol=0)
    other = config(fusion={"kind": "gated"})
    with pytest.raises(UsageError, match="a concat fusion of 8 dims"):
        train_on(tables, tmp_path / "o", init_from=tmp_path / "m", config=other)


def test_until_leaves_out_later_pairs(tables: Path, text_model: Path, tmp_path: Path) -> None:
    stage = TrainEncoder(
        tables / "pairs.parquet", tables / "items.parquet", model=str(text_model), until=130, config=config()
    )
    manifest = run(stage, tmp_path / "m", OPTIONS).manifest
    assert manifest is not None and manifest.data_cutoff == 129
    assert manifest.quality["pairs"] + manifest.quality["held_out_pairs"] == 30


def test_until_without_times_is_refused(tables: Path, text_model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.parquet"
    pl.read_parquet(tables / "pairs.parquet").drop("timestamp").write_parquet(bare)
    stage = TrainEncoder(bare, tables / "items.parquet", model=str(text_model), until=130, config=config())
    with pytest.raises(ContractError, match="--until cannot be held"):
        run(stage, tmp_path / "m", OPTIONS)


def test_two_runs_give_the_same_bytes(tables: Path, text_model: Path, tmp_path: Path) -> None:
    for name in "mn":
        train_on(tables, tmp_path / name, model=str(text_model), config=config(category="thing"))
    for name in ("model.safetensors", "config.json", "metrics.jsonl"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "n" / name).read_bytes()


def test_a_stopped_training_goes_on_to_the_same_bytes(
    tables: Path, text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = config(training={"checkpoint_every": 2})
    train_on(tables, tmp_path / "calm", model=str(text_model), config=knobs)
    steps = iter(range(99))
    follow = Scl.after_step

    def stop(model: Scl) -> None:
        if next(steps) == 13:
            raise KeyboardInterrupt
        follow(model)

    monkeypatch.setattr(Scl, "after_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train_on(tables, tmp_path / "stopped", model=str(text_model), config=knobs)
    assert not (tmp_path / "stopped").exists()
    monkeypatch.setattr(Scl, "after_step", follow)
    train_on(tables, tmp_path / "stopped", model=str(text_model), config=knobs)
    for name in ("model.safetensors", "metrics.jsonl", "config.json"):
        assert (tmp_path / "calm" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


@pytest.fixture(scope="module")
def dual_model(tmp_path_factory: pytest.TempPathFactory, text_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    half = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = BertTokenizerFast.from_pretrained(text_model)
    CLIPModel(
        CLIPConfig(
            text_config={**half, "vocab_size": len(tokenizer), "max_position_embeddings": 32},
            vision_config={**half, "image_size": 8, "patch_size": 4},
            projection_dim=12,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", ["head", "last", "lora"])
def test_a_dual_encoder_learns_as_one_model(tables: Path, dual_model: Path, tmp_path: Path, how: str) -> None:
    knobs = config(tune=how, last_layers=1, tower_lr=1.0, training={"epochs": 2})
    train_on(tables, tmp_path / "m", model=str(dual_model), config=knobs)
    before, after = (load_file(str(f / "model.safetensors")) for f in (dual_model, tmp_path / "m" / "dual"))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    halves = {half: any(name.startswith(half) for name in moved) for half in ("text_model", "vision_model")}
    assert halves == dict.fromkeys(halves, how != "head")
    assert any("layers.0." in name for name in moved) == (how == "lora")
    assert not any("embedding" in name for name in moved)
    assert embeddings(tables, tmp_path / "m", tmp_path / "e").shape == (48, 8)


def image_title_pairs(tables: Path, out: Path) -> Path:
    items = pl.read_parquet(tables / "items.parquet")
    items.select("item_id", query_text="title", kind=pl.lit("image_title")).write_parquet(out)
    return out


@pytest.mark.parametrize("how", ["head", "full"])
def test_an_image_title_pair_teaches_pictures_and_whole_items(
    tables: Path, text_model: Path, image_model: Path, tmp_path: Path, how: str
) -> None:
    """By default a residual fusion, and with frozen towers the neighbour term."""
    pairs = image_title_pairs(tables, tmp_path / "pairs.parquet")
    models = {"model": str(text_model), "image_model": str(image_model)}
    for name, knobs in (("m", {}), ("plain", {"neighbours": {"weight": 0}})):
        stage = TrainEncoder(pairs, tables / "items.parquet", config=config(tune=how, **knobs), **models)
        run(stage, tmp_path / name, OPTIONS)
    lines, plain = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("m", "plain")
    )
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert ("neighbours" in lines[0]) == (how == "head") and "neighbours" not in plain[0]
    assert json.loads((tmp_path / "m" / "config.json").read_text())["fusion"]["kind"] == "residual"
    assert embeddings(tables, tmp_path / "m", tmp_path / "e").shape == (48, 8)


def test_neighbours_need_towers_that_stay(tables: Path, text_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs features that stay"):
        train_on(
            tables,
            tmp_path / "m",
            model=str(text_model),
            config=config(tune="full", neighbours={"weight": 1.0}),
        )


@pytest.mark.slow
def test_two_processes_train_one_encoder(tables: Path, text_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "prerank_cli", "train", "encoder", "--threads", "1", "--engine", "torchrun"]
    command += ["--pairs", str(tables / "pairs.parquet"), "--items", str(tables / "items.parquet")]
    command += ["--model", str(text_model), "-o", str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert embeddings(tables, tmp_path / "m", tmp_path / "e").shape == (48, 128)


@pytest.mark.slow
def test_two_processes_agree_where_one_sees_no_picture_and_the_last_batch_is_ragged(
    tables: Path, text_model: Path, image_model: Path, tmp_path: Path
) -> None:
    """Every tower learns; 7 of 48 items have a picture, so many a rank's half batch has none at all."""
    items = pl.read_parquet(tables / "items.parquet").with_row_index()
    seldom = pl.when(pl.col("index") % 7 == 0).then("image")
    items.with_columns(image=seldom).drop("index").write_parquet(tmp_path / "items.parquet")
    calm = tmp_path / "calm"  # without dropout, which differs by rank
    shutil.copytree(text_model, calm)
    stated = json.loads((calm / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (calm / "config.json").write_text(json.dumps(stated | still))
    (tmp_path / "config.toml").write_text(
        """
        [train.encoder]
        tune = "full"
        valid_share = 0.1
        fusion = {dim = 8, hidden = 16}
        training = {epochs = 2, batch_size = 10, lr = 0.001, warmup_steps = 0, patience = 0}
        """
    )
    words = ["train", "encoder", "--threads", "1", "--config", str(tmp_path / "config.toml")]
    words += ["--pairs", str(tables / "pairs.parquet"), "--items", str(tmp_path / "items.parquet")]
    words += ["--model", str(calm), "--image-model", str(image_model), "-o"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start in (("one", []), ("two", torchrun)):
        engine = ["--engine", "torchrun"] if start else []
        command = [sys.executable, *start, "-m", "prerank_cli", *words, str(tmp_path / name), *engine]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    for part in (".", "text", "image"):
        one, two = (load_file(str(tmp_path / n / part / "model.safetensors")) for n in ("one", "two"))
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=2e-4)
