"""What `train encoder` shows the encoder: features of frozen towers, else texts and pictures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL.Image import Image

from prerank_tools.encoders.encode import Encoder
from prerank_tools.encoders.loading import EmbedConfig, load_image, load_text
from prerank_tools.encoders.pair_batches import FeatureContents, RawContents
from prerank_tools.encoders.pair_frames import PairContents
from prerank_tools.encoders.pictures import ImageError, decode, load
from prerank_tools.encoders.pretrain import TrainEncoderConfig, neighbour_weight
from prerank_tools.encoders.tower_folders import Towers
from prerank_tools.encoders.tuning import tune
from prerank_tools.encoders.word_dropout import shortened
from prerank_tools.stage import Context


def encode_frozen(found: PairContents, ctx: Context, config: TrainEncoderConfig) -> FeatureContents:
    """Every content once through the frozen towers, as `embed items` will do it."""
    embed = EmbedConfig(text=config.text, image=config.image)
    dual = ctx.work / "dual"
    text, image = (dual, dual) if dual.is_dir() else (ctx.work / "text", ctx.work / "image")
    encoder = Encoder(
        load_text(text, embed, device=ctx.device) if text.is_dir() else None,
        load_image(image, embed, device=ctx.device, threads=ctx.threads) if image.is_dir() else None,
    )
    faults: list[str | None] = [None] * len(found.texts)
    text_CT, has_text_C = encoder.encode_texts(found.texts)
    short = [at_least_one(encoder.encode_texts(texts)[0]) for texts in short_texts(found, config)]
    image_CI, has_image_C = encoder.encode_images(found.images, faults)
    has_image_C &= np.array([fault is None for fault in faults])
    if any(faults):
        ctx.log("images left out", unreadable=sum(fault is not None for fault in faults))
    return FeatureContents(
        torch.from_numpy(at_least_one(text_CT)),
        torch.from_numpy(at_least_one(image_CI)),
        torch.from_numpy(has_text_C),
        torch.from_numpy(has_image_C),
        torch.from_numpy(np.stack(short)) if short else None,
    )


def short_texts(found: PairContents, config: TrainEncoderConfig) -> list[list[str]]:
    """The texts with words left out, as often as training wants them; [] where it wants none."""
    share = config.neighbours.word_dropout
    if not share or not neighbour_weight(config.neighbours, found.pairs):
        return []
    return shortened(found.texts, share=share, seed=config.training.seed)


def at_least_one(x_CD: np.ndarray) -> np.ndarray:
    """A modality without a tower is one column of zeros: the fusion wants a width."""
    return x_CD if x_CD.shape[1] else np.zeros((len(x_CD), 1), np.float32)


def tune_towers(towers: Towers, config: TrainEncoderConfig) -> None:
    """Set what of the towers learns; the halves of a dual encoder are one model."""
    shared = towers.text is not None and getattr(towers.text, "model", None) is getattr(
        towers.image, "model", 0
    )
    for tower in (towers.text, None if shared else towers.image):
        if tower is not None:
            tune(tower, config.tune, layers=config.last_layers, rank=config.lora_rank)
    if shared and towers.text is not None and towers.image is not None:
        towers.image.model = towers.text.model


def raw_contents(
    found: PairContents, towers: Towers, config: TrainEncoderConfig, log: Callable[..., None]
) -> RawContents:
    """Texts tokenised once; the main picture of each content, where usable, decoded when a batch wants it."""
    ids: list[list[int]] = [[] for _ in found.texts]
    if towers.tokenizer is not None:
        limit = min(towers.tokenizer.max_tokens, config.text.max_tokens)
        shown = [row for row, text in enumerate(found.texts) if text]
        tokens = towers.tokenizer.ids_of([found.texts[row] for row in shown], max_tokens=limit)
        for row, found_ids in zip(shown, tokens, strict=True):
            ids[row] = list(found_ids)

    def picture(row: int) -> Image:
        data, limits = load(found.images[row][0]), config.image
        return decode(data, max_pixels=limits.max_pixels, max_bytes=limits.max_bytes)

    def pixels(row: int) -> np.ndarray:
        assert towers.pixels_of is not None
        return towers.pixels_of([picture(row)])[0]

    shown = [row for row, pictures in enumerate(found.images) if pictures and towers.image is not None]
    usable = [row for row in shown if _is_usable(picture, row)]
    if len(usable) < len(shown):
        log("images left out", unreadable=len(shown) - len(usable))
    has_image = np.zeros(len(found.images), dtype=bool)
    has_image[usable] = True
    pad_id = towers.tokenizer.pad_id if towers.tokenizer else 0
    return RawContents(
        ids,
        has_image,
        pixels,
        pad_id,
        towers.tokenizer.fixed_length if towers.tokenizer else None,
    )


def _is_usable(picture: Callable[[int], Image], row: int) -> bool:
    try:
        picture(row)
    except ImageError:
        return False
    return True
