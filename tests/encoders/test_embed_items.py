"""`prerank embed items` as a person types it: columns, models, faults, the next day."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from prerank_cli.main import call
from prerank_tools.encoders.fusion import FusionConfig, build_fusion
from prerank_tools.encoders.item_encoder import ItemEncoder
from prerank_tools.encoders.pictures import decode
from prerank_tools.encoders.saved_models import ItemEncoderConfig, save_item_encoder
from prerank_tools.encoders.settings import ImageConfig, TextConfig
from prerank_tools.encoders.transformers_models import image_tower, text_tower
from tests.encoders import tiny_models

TITLES = ["red dress for women", "blue shirt", "red dress summer", "shoe for men", "红色 连衣裙", "a b c"]


def photo(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, **columns: Any) -> Path:
    ids = columns.pop("item_id", [f"i{n}" for n in range(len(next(iter(columns.values()))))])
    pl.DataFrame({"item_id": ids, **columns}).write_parquet(path)
    return path


def embed(*words: object) -> int:
    return call(["embed", "items", *map(str, words), "--threads", "2", "--workers", "1"])


def rows(out: Path) -> dict[Any, dict[str, Any]]:
    frame = pl.read_parquet(out / "data/part-*.parquet") if out.is_dir() else pl.read_parquet(out)
    return {row["item_id"]: row for row in frame.to_dicts()}


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def data_bytes(out: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((out / "data").glob("*.parquet")))


def test_the_plain_line_needs_no_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    items = write(tmp_path / "items.parquet", title=TITLES)
    assert embed(items, "-o", tmp_path / "emb") == 0
    found = pl.read_parquet(tmp_path / "emb/data/part-00000.parquet")
    assert found.schema["embedding"] == pl.Array(pl.Float32, 6)
    np.testing.assert_allclose(np.linalg.norm(found["embedding"].to_numpy(), axis=1), 1, atol=1e-6)
    assert set(found["modalities"]) == {"text"} and found["content_hash"].n_unique() == 6
    assert "--model emb/model" in capfd.readouterr().err  # said aloud: what to type tomorrow
    assert embed(items, "-o", tmp_path / "emb") == 0
    assert "up to date" in capfd.readouterr().out


def test_a_stored_fit_places_new_items_in_yesterdays_space(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", title=TITLES)
    second = write(tmp_path / "b.parquet", title=[*TITLES[:3], "red shoe"], item_id=["i0", "i1", "i2", "new"])
    assert embed(first, "-o", tmp_path / "a") == 0
    assert embed(second, "--model", tmp_path / "a/model", "-o", tmp_path / "b") == 0
    assert manifest(tmp_path / "a")["lineage"] == manifest(tmp_path / "b")["lineage"]
    for item in ("i0", "i1", "i2"):
        assert rows(tmp_path / "a")[item] == rows(tmp_path / "b")[item]


@pytest.mark.parametrize("ids", [["x", "y", "z"], [3, 1, 2]])
def test_ids_of_either_type_come_out_sorted(tmp_path: Path, ids: list[Any]) -> None:
    items = write(tmp_path / "items.parquet", item_id=ids, title=TITLES[:3])
    assert embed(items, "-o", tmp_path / "emb") == 0
    assert list(rows(tmp_path / "emb")) == sorted(ids)


def test_a_template_joins_columns_and_leaves_out_what_is_null(tmp_path: Path) -> None:
    folder = tiny_models.bert(tmp_path / "bert")
    items = write(
        tmp_path / "items.parquet", title=["red dress", "shoe", None, None], brand=["a", None, "b", " "]
    )
    plain = write(tmp_path / "plain.parquet", text=["for red dress . a", "for shoe", "for b"])
    words = ("--model", folder, "--max-bad", "0.5")
    assert embed(items, "--template", "for {title} . {brand}", *words, "-o", tmp_path / "a") == 0
    assert embed(plain, *words, "-o", tmp_path / "b") == 0
    ours, expected = rows(tmp_path / "a"), rows(tmp_path / "b")
    for item in ("i0", "i1", "i2"):
        assert ours[item]["content_hash"] == expected[item]["content_hash"]
        np.testing.assert_allclose(ours[item]["embedding"], expected[item]["embedding"], atol=1e-5)
    quarantine = pl.read_parquet(tmp_path / "a/quarantine/*.parquet").to_dicts()
    assert quarantine == [{"item_id": "i3", "reason": "no text"}]


def test_without_a_title_every_text_column_counts(tmp_path: Path) -> None:
    items = write(tmp_path / "items.parquet", name=["red", "blue"], price=[1, 2], colour=["x", "y"])
    assert embed(items, "-o", tmp_path / "emb") == 0
    assert manifest(tmp_path / "emb")["params"]["template"] == "{name}. {colour}"


@pytest.mark.parametrize(
    ("dtype", "inner", "tolerance"), [("fp16", pl.Float16, 1e-3), ("int8", pl.Int8, 1e-2)]
)
def test_smaller_types_keep_the_direction(tmp_path: Path, dtype: str, inner: Any, tolerance: float) -> None:
    items = write(tmp_path / "items.parquet", title=TITLES)
    assert embed(items, "-o", tmp_path / "a") == 0
    assert embed(items, "--dtype", dtype, "-o", tmp_path / "b") == 0
    small = pl.read_parquet(tmp_path / "b/data/*.parquet")
    assert small.schema["embedding"].inner == inner
    y_ND = small["embedding"].to_numpy().astype(np.float32)
    if dtype == "int8":
        y_ND *= small["scale"].to_numpy()[:, None]
    x_ND = pl.read_parquet(tmp_path / "a/data/*.parquet")["embedding"].to_numpy()
    np.testing.assert_allclose(y_ND, x_ND, atol=tolerance)


# Images


def test_text_and_images_are_joined_and_either_may_be_missing(tmp_path: Path) -> None:
    images = [photo(0), photo(1), None, photo(3), photo(4), None]
    items = write(tmp_path / "items.parquet", title=[*TITLES[:3], None, *TITLES[4:]], image=images)
    models = (
        "--model",
        tiny_models.bert(tmp_path / "bert"),
        "--image-model",
        tiny_models.vit(tmp_path / "vit"),
    )
    assert embed(items, *models, "-o", tmp_path / "emb") == 0
    found = rows(tmp_path / "emb")
    assert [row["modalities"] for row in found.values()] == [
        "text+image", "text+image", "text", "image", "text+image", "text",
    ]  # fmt: skip
    both, text = np.array(found["i0"]["embedding"]), np.array(found["i2"]["embedding"])
    assert len(both) == 64
    np.testing.assert_allclose(np.linalg.norm(both[:32]), 0.5**0.5, atol=1e-5)  # halves weigh the same
    np.testing.assert_allclose(text[32:], 0)


def test_a_dual_encoder_reads_what_the_table_has(tmp_path: Path) -> None:
    folder = tiny_models.clip(tmp_path / "clip")
    both = write(tmp_path / "both.parquet", title=TITLES[:2], image=[photo(0), photo(1)])
    text = write(tmp_path / "text.parquet", title=TITLES[:2])
    for items, modalities, width in ((both, "text+image", 32), (text, "text", 16)):
        out = tmp_path / f"{items.stem}-emb"
        assert embed(items, "--model", folder, "-o", out) == 0
        assert {row["modalities"] for row in rows(out).values()} == {modalities}
        assert len(rows(out)["i0"]["embedding"]) == width
    assert embed(both, "--model", folder, "--modalities", "image", "-o", tmp_path / "image") == 0
    assert {row["modalities"] for row in rows(tmp_path / "image").values()} == {"image"}


def test_several_images_count_equally(tmp_path: Path) -> None:
    folder = tiny_models.vit(tmp_path / "vit")
    one = write(tmp_path / "one.parquet", image=[photo(0), photo(1)])
    two = write(tmp_path / "two.parquet", image=[photo(0)], image_2=[photo(1)])
    for items in (one, two):
        assert embed(items, "--model", folder, "-o", tmp_path / items.stem) == 0
    x, y = (np.array(rows(tmp_path / "one")[item]["embedding"]) for item in ("i0", "i1"))
    mean = (x + y) / np.linalg.norm(x + y)
    np.testing.assert_allclose(rows(tmp_path / "two")["i0"]["embedding"], mean, atol=1e-3)


def test_paths_are_read_below_the_root_and_nowhere_else(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "secret.png"
    (root / "sub").mkdir(parents=True)
    outside.write_bytes(photo(0))
    (root / "sub/a.png").write_bytes(photo(1))
    (root / "link.png").symlink_to(outside)
    (root / "inner.png").symlink_to(root / "sub/a.png")
    (root / "loop").symlink_to(root / "loop")
    paths = [
        "sub/a.png",
        "inner.png",
        "../secret.png",
        "link.png",
        str(outside),
        "none.png",
        "sub",
        "loop",
        "\0",
    ]
    items = write(tmp_path / "items.parquet", image_path=paths)
    words = ("--model", tiny_models.vit(tmp_path / "vit"), "--image-root", root, "--max-bad", "1")
    assert embed(items, *words, "-o", tmp_path / "emb") == 0
    assert list(rows(tmp_path / "emb")) == ["i0", "i1"]
    refused = pl.read_parquet(tmp_path / "emb/quarantine/*.parquet")
    reasons = dict(zip(refused["item_id"], refused["reason"], strict=True))
    assert [reasons[f"i{n}"] for n in (2, 3, 4)] == ["image_path leads out of --image-root"] * 3
    assert reasons["i5"] == "image_path none.png: no such file"
    assert set(reasons) == {f"i{n}" for n in range(2, 9)}


def test_row_faults_are_set_aside_with_a_reason_and_counted(tmp_path: Path) -> None:
    items = write(
        tmp_path / "items.parquet", title=[*TITLES, "", "x"], image=[photo(0)] * 6 + [None, b"junk"]
    )
    models = (
        "--model",
        tiny_models.bert(tmp_path / "bert"),
        "--image-model",
        tiny_models.vit(tmp_path / "vit"),
    )
    assert embed(items, *models, "-o", tmp_path / "strict") == 3
    assert not (tmp_path / "strict").exists()
    assert embed(items, *models, "--max-bad", "0.25", "-o", tmp_path / "emb") == 0
    refused = pl.read_parquet(tmp_path / "emb/quarantine/*.parquet")
    assert refused.rows() == [
        ("i6", "no text and no image"),
        ("i7", "image cannot be decoded (not a picture)"),
    ]
    assert manifest(tmp_path / "emb")["counts"]["quarantined"] == 2


def test_a_trained_item_encoder_gives_what_its_module_gives(tmp_path: Path) -> None:
    fusion = build_fusion(FusionConfig(kind="gated", text_dim=32, image_dim=32, dim=8)).eval()
    folder = tmp_path / "muse"
    save_item_encoder(folder, ItemEncoderConfig(template="{title}", fusion=fusion.config), fusion)
    text, tokenizer = text_tower(tiny_models.bert(folder / "text"), TextConfig(pooling="mean"))
    image, pixels_of = image_tower(tiny_models.vit(folder / "image"), ImageConfig())
    items = write(
        tmp_path / "items.parquet", title=["red dress", None, "shoe"], image=[photo(0), photo(1), None]
    )
    config = tmp_path / "config.toml"
    config.write_text("[embed.items]\nprecision = 'fp32'\n")
    assert embed(items, "--model", folder, "--config", config, "-o", tmp_path / "emb") == 0
    ids = torch.tensor(tokenizer.ids_of(["red dress", "a b", "shoe for"], max_tokens=16)[:1])
    pixels = torch.from_numpy(pixels_of([decode(photo(n), max_pixels=10_000) for n in (0, 1)]))
    module = ItemEncoder(text.eval(), image.eval(), fusion)
    with torch.inference_mode():
        both = module({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels[:1]})
        picture = module({"pixel_values": pixels[1:]})
    found = rows(tmp_path / "emb")
    np.testing.assert_allclose(found["i0"]["embedding"], both[0], atol=1e-5)
    np.testing.assert_allclose(found["i1"]["embedding"], picture[0], atol=1e-5)
    assert [row["modalities"] for row in found.values()] == ["text+image", "image", "text"]


# The next day


def incremental_case(tmp_path: Path) -> tuple[Path, Path]:
    """Monday's items, and Tuesday's: one edited, one delisted, two new."""
    monday = write(tmp_path / "monday.parquet", title=TITLES)
    tuesday = write(
        tmp_path / "tuesday.parquet",
        item_id=["i0", "i1", "i2", "i3", "i4", "n1", "n2"],
        title=[TITLES[0], "blue shirt for men", *TITLES[2:5], "red shoe", "summer shirt"],
    )
    return monday, tuesday


@pytest.mark.parametrize("model", ["tfidf", "bert"])
def test_the_next_day_equals_a_full_run(tmp_path: Path, model: str) -> None:
    monday, tuesday = incremental_case(tmp_path)
    config = tmp_path / "config.toml"
    config.write_text("[embed.items]\nexact_batches = true\n")
    words = ("--config", config)
    named = "tfidf" if model == "tfidf" else tiny_models.bert(tmp_path / "bert")
    assert embed(monday, "--model", named, *words, "-o", tmp_path / "mon") == 0
    again = () if model == "tfidf" else ("--model", named)
    assert embed(tuesday, "--previous", tmp_path / "mon", *again, *words, "-o", tmp_path / "tue") == 0
    full = tmp_path / "mon/model" if model == "tfidf" else named
    assert embed(tuesday, "--model", full, *words, "-o", tmp_path / "full") == 0
    assert data_bytes(tmp_path / "tue") == data_bytes(tmp_path / "full")
    counts, quality = manifest(tmp_path / "tue")["counts"], manifest(tmp_path / "tue")["quality"]
    assert (counts["encoded"], counts["reused"], counts["edited"]) == (3, 4, 1)
    assert (quality["new"], quality["delisted"]) == (2, 1)
    assert manifest(tmp_path / "tue")["lineage"] == manifest(tmp_path / "full")["lineage"]


def test_an_edited_image_is_encoded_again(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    (root / "0.png").write_bytes(photo(0))
    (root / "1.png").write_bytes(photo(1))
    items = write(tmp_path / "items.parquet", image_path=["0.png", "1.png"])
    words = ("--model", tiny_models.vit(tmp_path / "vit"), "--image-root", root)
    assert embed(items, *words, "-o", tmp_path / "mon") == 0
    (root / "1.png").write_bytes(photo(2))
    assert embed(items, *words, "--previous", tmp_path / "mon", "-o", tmp_path / "tue") == 0
    counts = manifest(tmp_path / "tue")["counts"]
    assert (counts["encoded"], counts["reused"], counts["edited"]) == (1, 1, 1)


def test_vectors_of_another_space_are_not_taken_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monday, tuesday = incremental_case(tmp_path)
    assert embed(monday, "-o", tmp_path / "mon") == 0
    bert = tiny_models.bert(tmp_path / "bert")
    before = ("--previous", tmp_path / "mon")
    assert embed(tuesday, *before, "--model", bert, "-o", tmp_path / "tue") == 3
    assert "another model, template or modality" in capfd.readouterr().err
    assert embed(tuesday, *before, "--template", "new {title}", "-o", tmp_path / "tue") == 3
    assert embed(tuesday, *before, "--dtype", "fp16", "-o", tmp_path / "tue") == 3
    assert not (tmp_path / "tue").exists()


# Errors: one line, one hint, the right code


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--model", "nowhere"), 2, "no such folder"),
        (("--template", "{nope}"), 3, "column `nope` is missing"),
        (("--template", "words only"), 2, "names no column"),
        (("--modalities", "image"), 2, "reads no image"),
        (("--model", "minilm", "--dim", "64"), 2, "gives 384 dimensions"),
        (("--model", "efficientnet-lite0"), 3, "no column `image`"),
        (("--model", "minilm", "--image-model", "minilm"), 2, "reads no images"),
    ],
)
def test_refusals(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, message: str
) -> None:
    items = write(tmp_path / "items.parquet", title=TITLES)
    assert embed(items, *words, "-o", tmp_path / "emb") == code
    error = capfd.readouterr().err
    assert message in error and "hint:" in error and "Traceback" not in error
    assert not (tmp_path / "emb").exists()


def test_a_model_without_its_weights_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_models.bert(tmp_path / "bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    items = write(tmp_path / "items.parquet", title=TITLES)
    assert embed(items, "--model", folder, "-o", tmp_path / "emb") == 3
    assert "safetensors" in capfd.readouterr().err


def test_a_model_with_code_of_its_own_is_not_run(tmp_path: Path) -> None:
    folder = tiny_models.bert(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    items = write(tmp_path / "items.parquet", title=TITLES)
    assert embed(items, "--model", folder, "-o", tmp_path / "emb") == 3
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_workers_write_the_same_bytes_in_as_many_parts(tmp_path: Path) -> None:
    parts = tmp_path / "items"
    parts.mkdir()
    write(parts / "part-0.parquet", title=TITLES[:4])
    write(parts / "part-1.parquet", item_id=["j0", "j1"], title=TITLES[4:])
    for workers in ("1", "2"):
        out = tmp_path / f"w{workers}"
        assert (
            call(["embed", "items", str(parts), "-o", str(out), "--workers", workers, "--threads", "1"]) == 0
        )
    assert data_bytes(tmp_path / "w1") == data_bytes(tmp_path / "w2")
    assert len(list((tmp_path / "w1/data").glob("*.parquet"))) == 2
