"""The towers of an item encoder on disk: put there before training, loaded to learn, saved plain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prerank_tools.encoders.dual import DualImageTower, DualTextTower, fixed_length
from prerank_tools.encoders.efficientnet import EfficientNetLite
from prerank_tools.encoders.model_choice import choose_models
from prerank_tools.encoders.model_folder import kind_of, read_config
from prerank_tools.encoders.saved_models import (
    convert_efficientnet_lite0,
    copy_model,
    load_efficientnet,
    save_efficientnet,
)
from prerank_tools.encoders.settings import ImageConfig, TextConfig
from prerank_tools.encoders.text import Tokenizer
from prerank_tools.encoders.tower import Tower
from prerank_tools.encoders.transformers_models import (
    image_tower,
    load_model,
    load_processor,
    load_tokenizer,
    text_tower,
)
from prerank_tools.encoders.tuning import merge
from prerank_tools.errors import ContractError, UsageError

PARTS = ("text", "image", "dual")


@dataclass(frozen=True)
class TowerSources:
    """Where each tower comes from; a dual encoder alone, or a text and an image model, either may lack."""

    text: Path | None = None
    image: Path | None = None
    dual: Path | None = None


@dataclass
class Towers:
    """Towers that can learn, and what feeds them."""

    text: Tower | None
    tokenizer: Tokenizer | None
    image: Tower | None
    pixels_of: Callable[[list[Image.Image]], np.ndarray] | None


def find_sources(model: str | None, image_model: str | None, init_from: Path | None) -> TowerSources:
    """The towers named, or those of an earlier item encoder."""
    if init_from is not None:
        if read_config(init_from).get("prerank_model") != "item_encoder":
            raise ContractError(
                f"{init_from}: not an item encoder", "name an output of `prerank train encoder`"
            )
        found = {part: init_from / part for part in PARTS if (init_from / part).is_dir()}
        return TowerSources(**found)
    slots = choose_models(model, image_model, modalities="auto", previous=None, at=None)
    by_kind = {slot.kind: slot.path for slot in slots}
    if "item_encoder" in by_kind:
        raise UsageError(f"--model {model}: already an item encoder", f"go on from it: --init-from {model}")
    if "tfidf" in by_kind and by_kind["tfidf"] is None:
        raise UsageError(
            "--model tfidf: not fitted yet", "name one that `embed items` stored: --model emb/model"
        )
    return TowerSources(
        by_kind.get("text") or by_kind.get("tfidf"), by_kind.get("image"), by_kind.get("dual")
    )


def install(sources: TowerSources, folder: Path) -> None:
    """Copy the towers into the model folder; published weights are converted on the way."""
    for part in PARTS:
        source = getattr(sources, part)
        if source is not None and source.is_file():
            convert_efficientnet_lite0(source, folder / part)
        elif source is not None:
            copy_model(source, folder / part)


def load_towers(folder: Path, text: TextConfig, image: ImageConfig) -> Towers:
    """The towers of a model folder; the two halves of a dual encoder share its parameters."""
    if (folder / "dual").is_dir():
        model, _ = load_model(folder / "dual")
        tokenizer = load_tokenizer(folder / "dual", model.config, length=fixed_length(model.config))
        pixels_of = load_processor(folder / "dual")
        return Towers(DualTextTower(model), tokenizer, DualImageTower(model), pixels_of)
    towers = Towers(None, None, None, None)
    if (folder / "text").is_dir():
        if kind_of(folder / "text") == "tfidf":
            raise UsageError("a TF-IDF model does not learn", "set tune = 'head', or name a text model")
        towers.text, towers.tokenizer = text_tower(folder / "text", text)
    if (folder / "image").is_dir():
        if read_config(folder / "image").get("prerank_model") == "efficientnet_lite":
            towers.image, towers.pixels_of = (
                load_efficientnet(folder / "image"),
                load_processor(folder / "image"),
            )
        else:
            towers.image, towers.pixels_of = image_tower(folder / "image", image)
    return towers


def save_towers(towers: Towers, folder: Path) -> None:
    """Write the learned weights over those that `install` put there; adapters are merged first."""
    dual = (folder / "dual").is_dir()
    for part, tower in (("text", towers.text), ("image", None if dual else towers.image)):
        if tower is None:
            continue
        merge(tower)
        if isinstance(tower, EfficientNetLite):
            save_efficientnet(tower, folder / part)
        else:
            model: Any = tower.model
            model.save_pretrained(folder / ("dual" if dual else part))
