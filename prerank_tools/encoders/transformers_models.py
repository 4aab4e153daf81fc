"""Hugging Face model folders as towers with their preprocessing: local files, safetensors, no remote code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import logging

from prerank_tools.encoders.dual import DualImageTower, DualTextTower, fixed_length, is_dual
from prerank_tools.encoders.image import ImageTower
from prerank_tools.encoders.preprocessing import pixel_values, split
from prerank_tools.encoders.settings import ImageConfig, TextConfig
from prerank_tools.encoders.text import Pooling, TextTower, Tokenizer
from prerank_tools.encoders.tower import Tower
from prerank_tools.encoders.word_frames import WordTable
from prerank_tools.errors import ContractError

OFFLINE = {"local_files_only": True, "trust_remote_code": False}


def text_tower(folder: Path, config: TextConfig) -> tuple[Tower, Tokenizer]:
    """The text model of a folder, or the text half of a dual encoder."""
    model, missing = load_model(folder)
    if is_dual(model.config):
        refuse_other_pairs(folder, model, missing)
        return DualTextTower(model), load_tokenizer(folder, model.config, length=fixed_length(model.config))
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    refuse_missing(folder, {key for key in missing if not key.startswith("pooler.")})
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # BERT's head for next-sentence prediction: nothing here reads it
    tower = TextTower(model, resolve_pooling(folder, config), dim=int(model.config.hidden_size))
    return tower, load_tokenizer(folder, model.config)


def take_short_attention(tower: Tower, tokenizer: Tokenizer) -> bool:
    """Give a two-way text model the GPU's attention for short texts; was it one that takes it?"""
    model = getattr(tower, "model", None)
    if find_spec("triton") is None or tokenizer.fixed_length or model is None or is_decoder(model.config):
        return False
    from prerank_tools.encoders.short_attention_triton import use_short_attention

    return use_short_attention(model)


def image_tower(folder: Path, config: ImageConfig) -> tuple[Tower, Callable[[list[Image.Image]], np.ndarray]]:
    """The vision model of a folder, or the image half of a dual encoder, and its preprocessing."""
    model, missing = load_model(folder)
    pixels_of = load_processor(folder)
    if is_dual(model.config):
        refuse_other_pairs(folder, model, missing)
        return DualImageTower(model), pixels_of
    refuse_missing(folder, {key for key in missing if "pooler" not in key})
    pooling = config.pooling
    if pooling == "auto":
        pooling = image_pooling(model, trained_pooler=not missing)
    elif pooling == "pooler" and missing:
        raise ContractError(f"{folder}: its weights hold no pooler", 'set image.pooling = "cls" or "mean"')
    tower = ImageTower(model, pooling, dim=0)
    tower.dim = output_dim(tower, pixels_of)
    return tower, pixels_of


def load_model(folder: Path) -> tuple[Any, set[str]]:
    """The model in fp32 and the names of weights that the folder does not hold."""
    quiet()
    try:
        model, info = AutoModel.from_pretrained(
            folder,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
            **OFFLINE,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as fault:
        raise ContractError(
            f"{folder}: cannot be loaded ({str(fault).splitlines()[0][:200]})",
            "weights must be safetensors of an architecture that transformers knows; no remote code is run",
        ) from fault
    return model.eval(), set(info["missing_keys"])


def refuse_missing(folder: Path, missing: set[str]) -> None:
    """Weights that are not there would be random numbers, other ones each night."""
    if missing:
        raise ContractError(
            f"{folder}: weights of `{min(missing)}` and {len(missing) - 1} more are not in it",
            "name a folder saved from the whole model",
        )


def refuse_other_pairs(folder: Path, model: Any, missing: set[str]) -> None:
    """Two configs may also mean a captioner, or images of any shape: neither is a pair of towers."""
    refuse_missing(folder, missing)
    if not hasattr(model, "get_text_features") or model.config.model_type == "siglip2":
        raise ContractError(
            f"{folder}: {model.config.model_type} is no dual encoder of fixed image size",
            "CLIP, SigLIP and their relatives are; see --image-model for a vision model beside a text model",
        )


def resolve_pooling(folder: Path, config: TextConfig) -> Pooling:
    """The configured pooling, or what the folder says (sentence-transformers' files), or by architecture."""
    if config.pooling != "auto":
        return config.pooling
    stated = folder / "1_Pooling" / "config.json"
    if stated.is_file():
        refuse_further_modules(folder)
        modes = json.loads(stated.read_text())
        named = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
        on = [
            mode for mode in named if modes.get(f"pooling_mode_{mode}") or modes.get("pooling_mode") == mode
        ]
        if len(on) == 1:
            return named[on[0]]  # type: ignore[return-value]
        raise ContractError(f"{stated}: a pooling that is not read here", "set text.pooling in --config")
    return "last" if is_decoder(AutoConfig.from_pretrained(folder, **OFFLINE)) else "mean"


def is_decoder(config: Any) -> bool:
    """A causal language model, whose last token alone has seen the whole text."""
    named = " ".join(getattr(config, "architectures", None) or ())
    return "ForCausalLM" in named or bool(getattr(config, "is_decoder", False))


def refuse_further_modules(folder: Path) -> None:
    """A sentence-transformers model may end in a Dense layer; without it the space is another one."""
    path = folder / "modules.json"
    known = ("Transformer", "Pooling", "Normalize")
    for module in json.loads(path.read_text()) if path.is_file() else ():
        name = module["type"].rsplit(".", 1)[-1]
        if name not in known:
            raise ContractError(
                f"{path}: the module {name} is not read here", "set text.pooling to encode without it"
            )


def load_tokenizer(folder: Path, config: Any, *, length: int | None = None) -> Tokenizer:
    """The folder's tokeniser; texts are cut at the model's limit, or padded to a trained `length`."""
    quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **OFFLINE)
    except (OSError, ValueError, KeyError, ImportError) as fault:
        raise ContractError(
            f"{folder}: its tokenizer cannot be loaded ({str(fault).splitlines()[0][:200]})",
            "save the tokenizer into the model folder",
        ) from fault
    fast = getattr(tokenizer, "backend_tokenizer", None)

    def ids_of(texts: Sequence[str], *, max_tokens: int) -> list[list[int]]:
        if fast is None or length:
            padding = {"padding": "max_length"} if length else {}
            return tokenizer(list(texts), truncation=True, max_length=length or max_tokens, **padding)[
                "input_ids"
            ]
        # The tokeniser itself, five times as fast as transformers' wrapping of its result.
        fast.no_padding()
        fast.enable_truncation(max_tokens)
        return [encoding.ids for encoding in fast.encode_batch_fast(list(texts))]

    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    words = None if fast is None or length else WordTable.of(fast)
    return Tokenizer(ids_of, pad_id, length or token_limit(folder, tokenizer, config), length, words)


def token_limit(folder: Path, tokenizer: Any, config: Any) -> int:
    """Longest text in tokens that folder, tokeniser and position table all allow."""
    stated = folder / "sentence_bert_config.json"
    limits = [tokenizer.model_max_length]
    if stated.is_file():
        limits.append(json.loads(stated.read_text()).get("max_seq_length") or limits[0])
    text = getattr(config, "text_config", config)
    positions = getattr(text, "max_position_embeddings", None)
    if positions:
        # RoBERTa counts positions from the padding id on.
        limits.append(positions - (text.pad_token_id + 1 if "roberta" in text.model_type else 0))
    return int(min(limits))


def load_processor(folder: Path) -> Callable[[list[Image.Image]], np.ndarray]:
    """The folder's image processor on Pillow: pictures -> float32 (B, C, H, W)."""
    quiet()
    try:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **OFFLINE)
    except (OSError, ValueError, KeyError, ImportError) as fault:
        raise ContractError(
            f"{folder}: its image processor cannot be loaded ({str(fault).splitlines()[0][:200]})",
            "save the image processor into the model folder",
        ) from fault
    return split(processor) or partial(pixel_values, processor)


def image_pooling(model: Any, *, trained_pooler: bool) -> Any:
    """The pooled output where its weights are there, else the class token, else the mean over the map."""
    if getattr(model, "pooler", None) is not None and trained_pooler:
        return "pooler"
    return "cls" if any("cls_token" in name for name, _ in model.named_parameters()) else "mean"


@torch.inference_mode()
def output_dim(tower: Tower, pixels_of: Callable[[list[Image.Image]], np.ndarray]) -> int:
    """Width of a vision tower, found by running it: configs name it in many ways."""
    return int(tower(torch.from_numpy(pixels_of([Image.new("RGB", (64, 64))]))).shape[1])


def quiet() -> None:
    """No loading bars and reports of transformers between our own lines."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
