"""What `gpu_encode.py` runs on: model folders of common sizes with random weights, titles, JPEGs, FLOPs."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

VOCABULARY = 30_522
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@dataclass(frozen=True)
class Size:
    """What is built and how much is measured."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    pixels: int = 224
    titles: int = 65_536  # a shard, as `embed items` cuts them
    text_shards: int = 48
    jpegs: int = 8_192
    image_shards: int = 32
    repeats: int = 5
    gemm: int = 8192


SMALL = Size(64, 2, 2, 32, 1_024, 4, 256, 4, 2, 256)


def text_folder(size: Size, folder: Path) -> Path:
    """A BERT with a WordPiece tokeniser of BERT's normaliser over a made-up vocabulary of BERT's size."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
    )
    BertModel(config).save_pretrained(folder)
    words = [*SPECIAL, *(f"w{n}" for n in range(VOCABULARY - len(SPECIAL)))]
    inner = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder


def image_folder(size: Size, folder: Path) -> Path:
    """A ViT with 16 x 16 patches and bicubic preprocessing."""
    import torch
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        image_size=size.pixels,
        patch_size=16,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": size.pixels, "width": size.pixels}, resample=3).save_pretrained(
        folder
    )
    return folder


def transformer_flops(size: Size, lengths_N: np.ndarray) -> float:
    """Products of all layers: 24 S H^2 for the weights and 4 S^2 H for attention, a layer and a sequence."""
    s = lengths_N.astype(np.float64)
    return float(size.layers * (24 * s * size.hidden**2 + 4 * s**2 * size.hidden).sum())


def image_flops(size: Size) -> float:
    """Of one picture: its patches and the class token through the layers, and the patch embedding."""
    patches = (size.pixels // 16) ** 2
    return transformer_flops(size, np.array([patches + 1])) + 2 * patches * 768 * size.hidden


def titles_like(count: int) -> list[str]:
    """Titles of 3 to 40 words, 12 tokens on average with [CLS] and [SEP]: a long tail, as in catalogues."""
    rng = np.random.default_rng(0)
    words_N = np.clip(np.rint(rng.gamma(6.0, 10 / 6.0, count)), 3, 40).astype(int)
    drawn = rng.integers(0, VOCABULARY - len(SPECIAL), words_N.sum())
    ends = np.cumsum(words_N)
    return [" ".join(f"w{w}" for w in drawn[end - n : end]) for n, end in zip(words_N, ends, strict=True)]


def jpegs_like(count: int) -> list[bytes]:
    """256 smooth random pictures of 256 x 256, over and over: about 17 kB each, as product thumbnails are."""
    from PIL import Image

    rng = np.random.default_rng(0)
    data = []
    for _ in range(256):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        data.append(buffer.getvalue())
    return [data[n % 256] for n in range(count)]


def write_table(folder: Path, name: str, values: list[str] | list[bytes], shards: int) -> Path:
    """`shards` parts of the same values under new ids."""
    folder.mkdir()
    for part in range(shards):
        ids = np.arange(part * len(values), (part + 1) * len(values))
        frame = pl.DataFrame({"item_id": ids, name: values})
        frame.write_parquet(folder / f"part-{part:05d}.parquet", compression="uncompressed")
    return folder
