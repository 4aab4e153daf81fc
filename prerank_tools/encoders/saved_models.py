"""Our own model folders, written and read: TF-IDF, EfficientNet-Lite, item encoders; no pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from prerank_tools.encoders.efficientnet import (
    EfficientNetLite,
    EfficientNetLiteConfig,
    fold_published_weights,
    lite0,
)
from prerank_tools.encoders.fusion import Fusion, FusionConfig, build_fusion
from prerank_tools.encoders.model_folder import read_config
from prerank_tools.encoders.tfidf import Tfidf, TfidfConfig
from prerank_tools.errors import ContractError

# Pillow's bicubic; pixels as the published weights were trained on: (x - 127) / 128.
LITE0_PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [127 / 255] * 3,
    "image_std": [128 / 255] * 3,
}


class ItemEncoderConfig(BaseModel):
    """`config.json` of an item encoder: what `embed items` must do as training did."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prerank_model: Literal["item_encoder"] = "item_encoder"
    template: str
    fusion: FusionConfig
    pooling: Literal["mean", "cls", "last"] = "mean"
    image_pooling: Literal["auto", "pooler", "cls", "mean"] = "auto"
    max_tokens: int = 256


def save_tfidf(model: Tfidf, folder: Path, *, template: str) -> None:
    """Vocabulary, weights and directions as JSON and safetensors; the same bytes for the same model."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "config.json",
        {"prerank_model": "tfidf", "template": template, "dim": model.dim, "fit": model.config.model_dump()},
    )
    write_json(folder / "vocabulary.json", {"terms": list(model.terms), "idf": model.idf_V.tolist()})
    save_arrays({"components": np.ascontiguousarray(model.components_DV)}, folder / "model.safetensors")


def load_tfidf(folder: Path) -> Tfidf:
    """The model that `save_tfidf` wrote."""
    config, words = read_config(folder), read_json(folder / "vocabulary.json")
    components_DV = read_weights(folder, load_arrays)["components"]
    if components_DV.shape != (config["dim"], len(words["terms"])) or len(words["idf"]) != len(
        words["terms"]
    ):
        raise ContractError(
            f"{folder}: its files belong to different models", "take last night's folder whole"
        )
    idf_V = np.array(words["idf"], dtype=np.float64)
    return Tfidf(TfidfConfig(**config["fit"]), words["terms"], idf_V, components_DV)


def convert_efficientnet_lite0(weights: Path, folder: Path) -> None:
    """Turn the published PyTorch weights into a model folder, once.

    `weights_only` refuses everything in the file but tensors.
    """
    published: Mapping[str, torch.Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    config = lite0()
    save_efficientnet(EfficientNetLite(config), folder, state=fold_published_weights(published, config))


def save_efficientnet(
    model: EfficientNetLite, folder: Path, *, state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Configuration, weights and preprocessing of an EfficientNet-Lite."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", model.config.model_dump())
    write_json(folder / "preprocessor_config.json", LITE0_PROCESSOR)
    weights = state if state is not None else model.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


def load_efficientnet(folder: Path) -> EfficientNetLite:
    """The model that `save_efficientnet` wrote."""
    model = EfficientNetLite(EfficientNetLiteConfig(**read_config(folder)))
    model.load_state_dict(read_weights(folder, load_file))
    return model.eval()


def save_item_encoder(folder: Path, config: ItemEncoderConfig, fusion: Fusion) -> None:
    """`config.json` and the fusion's weights; the towers save `text/` and `image/` beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.model_dump())
    save_file({name: t.contiguous() for name, t in fusion.state_dict().items()}, folder / "model.safetensors")


def load_item_encoder(folder: Path) -> tuple[ItemEncoderConfig, Fusion]:
    """What `save_item_encoder` wrote."""
    try:
        config = ItemEncoderConfig(**read_config(folder))
    except ValidationError as fault:
        key = ".".join(str(word) for word in fault.errors()[0]["loc"])
        raise ContractError(
            f"{folder}/config.json: `{key}`: {fault.errors()[0]['msg']}", "written by another version?"
        ) from fault
    fusion = build_fusion(config.fusion)
    fusion.load_state_dict(read_weights(folder, load_file))
    return config, fusion.eval()


def copy_model(source: Path, to: Path) -> None:
    """A model folder's files beside the table that they made, so that tomorrow needs only that table."""
    shutil.copytree(source, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))


def read_weights(folder: Path, load: Any) -> dict[str, Any]:
    """`model.safetensors` of a folder."""
    path = folder / "model.safetensors"
    try:
        return load(path)
    except (OSError, SafetensorError) as fault:
        raise ContractError(
            f"{path}: cannot be read ({fault})", "is the folder whole? make it again"
        ) from fault


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as fault:
        raise ContractError(f"{path}: cannot be read", "is the folder whole? make it again") from fault


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON with sorted keys: the same bytes for the same content."""
    path.write_text(json.dumps(content, sort_keys=True, ensure_ascii=False, indent=1) + "\n")
