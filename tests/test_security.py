"""Hostile input: pictures that would fill the memory, paths out of the root, files that want to run code."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import subprocess
import sys
import zlib
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from prerank_cli.main import call
from tests.encoders.test_image import png_header
from tests.encoders.tiny_models import bert, vit
from tests.toy import write_items

ROOT = Path(__file__).parent.parent


def photo(size: tuple[int, int] = (20, 20), colour: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def whole_bomb(side: int) -> bytes:
    """A PNG of `side` x `side` black pixels, whole and valid: kilobytes that become gigabytes."""
    deflate, row = zlib.compressobj(9), b"\0" * (1 + side * 3)
    body = b"".join(deflate.compress(row) for _ in range(side)) + deflate.flush()
    start = png_header(side, side)
    start = start[: start.index(b"IDAT") - 4]
    end = b"\0\0\0\0IEND" + zlib.crc32(b"IEND").to_bytes(4, "big")
    crc = zlib.crc32(b"IDAT" + body).to_bytes(4, "big")
    return start + len(body).to_bytes(4, "big") + b"IDAT" + body + crc + end


def write(path: Path, **columns: object) -> Path:
    rows = len(next(iter(columns.values())))  # type: ignore[arg-type]
    pl.DataFrame({"item_id": [f"i{n}" for n in range(rows)], **columns}).write_parquet(path)
    return path


def refused(out: Path) -> dict[str, str]:
    """Item id and reason of every row set aside."""
    found = pl.read_parquet(out / "quarantine/*.parquet")
    return dict(zip(found["item_id"], found["reason"], strict=True))


def test_pictures_that_would_fill_the_memory_are_refused_with_their_row(tmp_path: Path) -> None:
    bombs = {
        "i1": (whole_bomb(12_000), "12000 x 12000, more than 64000000 pixels"),
        "i2": (png_header(2**31 - 1, 2**31 - 1), "pixels"),
        "i3": (png_header(60_000, 60_000), "pixels"),
        "i4": (photo((20_000, 3)), "100 times as long as wide"),
        "i5": (png_header(0, 7), "cannot be decoded"),
        "i6": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ls) run\n", "cannot be decoded"),
    }
    assert len(bombs["i1"][0]) < 1 << 20
    items = write(tmp_path / "items.parquet", image=[photo(), *(data for data, _ in bombs.values())])
    line = ["embed", "items", str(items), "--model", str(vit(tmp_path / "vit")), "--workers", "1"]
    assert call([*line, "-o", str(tmp_path / "strict")]) == 3
    assert call([*line, "-o", str(tmp_path / "emb"), "--max-bad", "1"]) == 0
    assert pl.read_parquet(tmp_path / "emb/data/*.parquet")["item_id"].to_list() == ["i0"]
    reasons = refused(tmp_path / "emb")
    assert list(reasons) == list(bombs)
    assert all(said in reasons[item] for item, (_, said) in bombs.items()), reasons


def test_a_training_leaves_such_pictures_out_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [photo(colour=colour) for colour in ("red", "green", "blue", "white", "black", "pink")]
    items = write(
        tmp_path / "items.parquet",
        title=[f"thing {n}" for n in range(8)],
        image=[*pictures, whole_bomb(9_000), b"no picture"],
    )
    pairs = tmp_path / "pairs.parquet"
    pl.DataFrame(
        {"query_text": [f"one thing {n}" for n in range(8)], "item_id": [f"i{n}" for n in range(8)]}
    ).write_parquet(pairs)
    for tune in ("head", "last"):
        config = tmp_path / f"{tune}.toml"
        config.write_text(f"[train.encoder]\ntune = '{tune}'\n[train.encoder.training]\nepochs = 1\n")
        models = ["--model", str(bert(tmp_path / "bert")), "--image-model", str(vit(tmp_path / "vit"))]
        line = ["train", "encoder", "--pairs", str(pairs), "--items", str(items), *models]
        assert call([*line, "--config", str(config), "-o", str(tmp_path / tune)]) == 0
        assert "images left out unreadable=2" in capsys.readouterr().err, tune


@pytest.mark.parametrize(
    "name", ["../secret.png", "a/../../secret.png", "/etc/hostname", "out.png", "dir/secret.png"]
)
def test_paths_and_links_that_leave_the_root_are_refused_with_their_row(tmp_path: Path, name: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "secret.png"
    (root / "a").mkdir(parents=True)
    outside.write_bytes(photo())
    (root / "ok.png").write_bytes(photo(colour="blue"))
    (root / "out.png").symlink_to(outside)
    (root / "dir").symlink_to(tmp_path, target_is_directory=True)
    items = write(tmp_path / "items.parquet", image_path=["ok.png", name])
    line = ["embed", "items", str(items), "--model", str(vit(tmp_path / "vit")), "--image-root", str(root)]
    assert call([*line, "-o", str(tmp_path / "emb"), "--max-bad", "1", "--workers", "1"]) == 0
    assert refused(tmp_path / "emb") == {"i1": "image_path leads out of --image-root"}


class Runs:
    """Unpickled, it writes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.place}",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "optimizer.pt", "tokenizer.pkl"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside safetensors", "instead of them"])
def test_no_pickle_is_read_from_a_model_folder(tmp_path: Path, name: str, beside: bool) -> None:
    folder = bert(tmp_path / "bert")
    (folder / name).write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    if not beside:
        (folder / "model.safetensors").unlink()
    items = write_items(tmp_path / "items.parquet")
    code = call(["embed", "items", str(items), "--model", str(folder), "-o", str(tmp_path / "emb")])
    assert code == (0 if beside else 3)
    assert not (tmp_path / "ran").exists()


def test_a_codebook_a_user_model_and_a_scorer_of_pickles_are_refused(tmp_path: Path) -> None:
    x = pl.Series([[float(n), 1.0] for n in range(9)], dtype=pl.Array(pl.Float32, 2))
    emb = tmp_path / "emb.parquet"
    pl.DataFrame({"item_id": range(9), "embedding": x}).write_parquet(emb)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"kind": "rkmeans", "prerank_model": "user"}))
    for name in ("codebook.pkl", "model.safetensors", "codebook.safetensors", "arrays.npy"):
        (folder / name).write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    line = ["quantize", "sid", str(emb), "--codebook", str(folder), "-o", str(tmp_path / "sid")]
    assert call(line) in (2, 3)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "sid").exists()


OFFLINE = """
import socket, sys
from prerank_cli.main import call
def refuse(*arguments, **more):
    print("CONNECTS", arguments, file=sys.stderr)
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
sys.exit(call(sys.argv[1:]))
"""


@pytest.mark.parametrize(("model", "asked"), [("bert", False), ("tfidf", False), ("acme/some-model", True)])
def test_the_hub_is_asked_only_where_a_hub_model_is_named(tmp_path: Path, model: str, asked: bool) -> None:
    items = write_items(tmp_path / "items.parquet")
    bert(tmp_path / "bert")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, "embed", "items", str(items), "--model", model, "-o", "emb"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("CONNECTS" in done.stderr) == asked, done.stderr
    assert done.returncode == (2 if asked else 0), done.stderr


@pytest.mark.parametrize("value", ["$(touch ran)", "`touch ran`", "; touch ran", "!touch ran", "| touch ran"])
def test_nothing_in_a_config_is_run(tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    items = write_items(tmp_path / "items.parquet")
    for key in ("model", "image_root", "previous", "template", "device"):
        (tmp_path / "c.toml").write_text(f"[embed.items]\n{key} = '{value}'\n")
        assert call(["embed", "items", str(items), "-o", "emb", "--config", "c.toml"]) in (0, 2, 3, 4)
    monkeypatch.setenv("PRERANK_EMBED_ITEMS_MODEL", value)
    assert call(["embed", "items", str(items), "-o", "other"]) == 2
    assert not (tmp_path / "ran").exists()


def test_only_torchruns_agent_is_started_and_no_shell_ever() -> None:
    for folder in ("cli", "prerank_tools", "schemas"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            assert "shell=True" not in text and not re.search(r"os\.(system|popen|exec|spawn)", text), path
            names = {
                alias.name
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.Import)
                for alias in node.names
            }
            assert "subprocess" not in names or path.name == "torchrun.py", path
            assert not names & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
