"""Dual encoders from a local folder: both halves of CLIP and SigLIP equal plain transformers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from prerank_tools.encoders.loading import EmbedConfig, load_image, load_text
from prerank_tools.encoders.model_folder import kind_of
from prerank_tools.encoders.settings import ImageConfig, TextConfig
from tests.encoders import tiny_models

FAMILIES = [tiny_models.clip, tiny_models.siglip]
TITLES = ["red dress", "blue shirt for men", "a b c", "shoe"]
CONFIG = EmbedConfig(precision="fp32", text=TextConfig(token_budget=64), image=ImageConfig(batch=2))


def unit(x_ND: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(x_ND, dim=-1).numpy()


@pytest.mark.parametrize("make", FAMILIES)
def test_texts(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert kind_of(folder) == "dual"
    model, tokenize = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    # SigLIP was trained on texts padded to one length, without a mask; CLIP reads what is there.
    padding = {"padding": "max_length", "max_length": 16} if make is tiny_models.siglip else {}
    with torch.inference_mode():
        ids = [tokenize(title, return_tensors="pt", **padding)["input_ids"] for title in TITLES]
        y_ND = torch.cat([model.get_text_features(input_ids=i).pooler_output for i in ids])
    np.testing.assert_allclose(load_text(folder, CONFIG, device="cpu").encode(TITLES), unit(y_ND), atol=2e-6)


@pytest.mark.parametrize("make", FAMILIES)
def test_images(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)) for _ in range(3)]
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        y_ND = model.get_image_features(pixel_values=pixels).pooler_output
    data = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        data.append(buffer.getvalue())
    x_ND, faults = load_image(folder, CONFIG, device="cpu", threads=1).encode(data)
    np.testing.assert_allclose(x_ND, unit(y_ND), atol=2e-6)
    assert faults == [None] * 3
