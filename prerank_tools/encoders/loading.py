"""From what `--model` and `--image-model` name to a ready encoder, and to the fingerprint of its space."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from prerank_tools.encoders.encode import Encoder, EncodesText
from prerank_tools.encoders.image import ImageEncoder
from prerank_tools.encoders.model_folder import Kind, kind_of, model_digest, read_config
from prerank_tools.encoders.saved_models import (
    ItemEncoderConfig,
    load_efficientnet,
    load_item_encoder,
    load_tfidf,
)
from prerank_tools.encoders.settings import ImageConfig, TextConfig
from prerank_tools.encoders.text import TextEncoder
from prerank_tools.encoders.tfidf import TfidfConfig
from prerank_tools.encoders.tower import no_log
from prerank_tools.encoders.transformers_models import (
    image_tower,
    load_processor,
    resolve_pooling,
    take_short_attention,
    text_tower,
)
from prerank_tools.errors import UsageError

Modalities = Literal["text", "image", "both"]
Log = Callable[..., None]


class EmbedConfig(BaseModel):
    """The knobs of `embed items` (`[embed.items]` in a TOML file)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device multiplies it natively
    exact_batches: bool = False  # the same bytes at any budget, order and subset of items; somewhat slower
    compile: bool = False  # torch.compile, block by block: seconds at the start, 5 to 10 % faster on a GPU
    text: TextConfig = TextConfig()
    image: ImageConfig = ImageConfig()
    tfidf: TfidfConfig = TfidfConfig()


@dataclass(frozen=True)
class Models:
    """Model folders by what they do, and what is to be encoded with them."""

    text: Path | None
    image: Path | None
    item: Path | None  # an item encoder, which holds both
    modalities: Modalities
    template: str


def capabilities(kind: Kind, folder: Path | None) -> set[str]:
    """Which modalities a model reads."""
    if kind == "item_encoder" and folder is not None:
        if (folder / "dual").is_dir():
            return {"text", "image"}
        return {name for name in ("text", "image") if (folder / name).is_dir()}
    return {"dual": {"text", "image"}, "image": {"image"}}.get(kind, {"text"})


def load_encoder(
    models: Models, config: EmbedConfig, *, device: str, threads: int, log: Log = no_log
) -> Encoder:
    """The encoder of these models, ready to run; `log` is told where a batch had to be halved."""
    fusion, text_folder, image_folder = None, models.text, models.image
    if models.item is not None:
        stated, fusion = load_item_encoder(models.item)
        config = as_trained(config, stated)
        dual = models.item / "dual"
        text_folder, image_folder = (
            (dual, dual) if dual.is_dir() else (models.item / "text", models.item / "image")
        )
    text = image = None
    if models.modalities != "image" and text_folder is not None and text_folder.is_dir():
        text = load_text(text_folder, config, device=device, log=log)
    if models.modalities != "text" and image_folder is not None and image_folder.is_dir():
        image = load_image(image_folder, config, device=device, threads=threads, log=log)
    return Encoder(text, image, fusion)


def as_trained(config: EmbedConfig, stated: ItemEncoderConfig) -> EmbedConfig:
    """The knobs with what training fixed put in."""
    text = config.text.model_copy(update={"pooling": stated.pooling, "max_tokens": stated.max_tokens})
    image = config.image.model_copy(update={"pooling": stated.image_pooling})
    return config.model_copy(update={"text": text, "image": image})


def load_text(folder: Path, config: EmbedConfig, *, device: str, log: Log = no_log) -> EncodesText:
    """The text side: TF-IDF or a transformers model."""
    if kind_of(folder) == "tfidf":
        return load_tfidf(folder)
    tower, tokenizer = text_tower(folder, config.text)
    # Exact batches keep the general attention: the other one's sums depend on where in a block a text lies.
    masks_freely = device == "cuda" and not config.exact_batches and take_short_attention(tower, tokenizer)
    return TextEncoder(
        tower,
        tokenizer,
        max_tokens=config.text.max_tokens,
        token_budget=config.text.token_budget,
        precision=config.precision,
        exact=config.exact_batches,
        compiled=config.compile,
        masks_freely=masks_freely,
        device=device,
        log=log,
    )


def load_image(
    folder: Path, config: EmbedConfig, *, device: str, threads: int, log: Log = no_log
) -> ImageEncoder:
    """The image side: an EfficientNet-Lite or a transformers model."""
    if read_config(folder).get("prerank_model") == "efficientnet_lite":
        tower, pixels_of = load_efficientnet(folder), load_processor(folder)
    else:
        tower, pixels_of = image_tower(folder, config.image)  # type: ignore[assignment]
    return ImageEncoder(
        tower,
        pixels_of,
        batch=config.image.batch,
        max_pixels=config.image.max_pixels,
        max_bytes=config.image.max_bytes,
        precision=config.precision,
        exact=config.exact_batches,
        compiled=config.compile,
        device=device,
        threads=threads,
        log=log,
    )


def describe_space(models: Models, config: EmbedConfig) -> Mapping[str, Any]:
    """All that places an item's vector: model digests, template, pooling, lengths, modalities, fusion."""
    space: dict[str, Any] = {"modalities": models.modalities, "template": models.template}
    if models.item is not None:
        stated = load_item_encoder(models.item)[0]
        return {
            **space,
            "model": model_digest(models.item),
            "fusion": stated.fusion.kind,
            "pooling": stated.pooling,
            "image_pooling": stated.image_pooling,
            "max_tokens": stated.max_tokens,
        }
    if models.text is not None and models.modalities != "image":
        space["text_model"] = model_digest(models.text)
        kind = kind_of(models.text)
        if kind != "tfidf":
            space["max_tokens"] = config.text.max_tokens
            space["pooling"] = resolve_pooling(models.text, config.text) if kind == "text" else "dual"
    if models.image is not None and models.modalities != "text":
        space["image_model"] = model_digest(models.image)
        space["image_pooling"] = config.image.pooling
    if models.modalities == "both":
        space["fusion"] = "concat_unit"
    return space


def fingerprint_of(space: Mapping[str, Any]) -> str:
    """sha256 of a space's description: equal fingerprints, comparable vectors."""
    return hashlib.sha256(json.dumps(dict(space), sort_keys=True).encode()).hexdigest()


def refuse_width(dim: int | None, width: int) -> None:
    """A width other than the model's own is refused: cutting or projecting it would be another model."""
    if dim is not None and dim != width:
        raise UsageError(
            f"--dim {dim}: the model gives {width} dimensions",
            "leave --dim out; `prerank train encoder` trains a head of any width, --model tfidf fits any",
        )
