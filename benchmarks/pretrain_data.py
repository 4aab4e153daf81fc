"""What the pre-training benchmarks share: frozen features encoded once, and intervals over seeds."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from prerank_tools.encoders.encode import Encoder
from prerank_tools.encoders.loading import EmbedConfig, load_image, load_text
from prerank_tools.encoders.model_folder import find_model
from prerank_tools.encoders.saved_models import convert_efficientnet_lite0

T_QUANTILE = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def frozen_features(
    cache: Path, texts: Mapping[str, Sequence[str]], images: Sequence[bytes], *, threads: int
) -> dict[str, np.ndarray]:
    """Unit MiniLM vectors of each list of texts, EfficientNet-Lite0 ones of the images; kept in `cache`."""
    if cache.is_file():
        return load_file(cache)
    config = EmbedConfig()
    found = {}
    text = load_text(find_model("minilm"), config, device="cpu")
    for name, lines in texts.items():
        found[name] = Encoder(text, None).encode_texts(lines)[0]
    if images:
        folder = cache.with_suffix(".model")
        convert_efficientnet_lite0(find_model("efficientnet-lite0"), folder)
        vision = load_image(folder, config, device="cpu", threads=threads)
        faults: list[str | None] = [None] * len(images)
        found["image"] = Encoder(None, vision).encode_images([[image] for image in images], faults)[0]
        assert not any(faults), faults
    cache.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, cache)
    return found


def interval(values: Sequence[float]) -> str:
    """Mean and half width of its 95 % t-interval over seeds."""
    if len(values) < 2:
        return f"{mean(values):.3f}"
    half = T_QUANTILE[len(values) - 1] * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.3f} ± {half:.3f}"


def machine(threads: int) -> str:
    """One line on where the figures come from."""
    import polars
    import transformers

    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return (
        f"{datetime.now(UTC):%Y-%m-%d}; {model}, {threads} thread(s); torch {torch.__version__}, "
        f"transformers {transformers.__version__}, polars {polars.__version__}, "
        f"Python {platform.python_version()}"
    )
