"""Text vectors against plain transformers, one text at a time, and exact batches bit by bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from prerank_tools.encoders.loading import EmbedConfig, load_text
from prerank_tools.encoders.model_folder import find_model
from prerank_tools.encoders.settings import TextConfig
from prerank_tools.encoders.text import TextEncoder
from tests.encoders import tiny_models

TITLES = [
    "red dress for women",
    "blue shirt",
    "red dress for women summer",
    "shoe",
    "a b c a b c a b c a b c a b c a b c",
    "红 色 dress",
    "blue shirt",
]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def encoder(folder: Path, *, exact: bool = False, precision: str = "fp32", **text: object) -> TextEncoder:
    config = EmbedConfig(precision=precision, exact_batches=exact, text=TextConfig(**text))
    found = load_text(folder, config, device="cpu")
    assert isinstance(found, TextEncoder)
    return found


@torch.inference_mode()
def one_by_one(folder: Path, pooling: str) -> np.ndarray:
    """The oracle: no batch, no padding, no mask; the vector by the definition of its pooling."""
    model, tokenize = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vectors = []
    for title in TITLES:
        ids = tokenize(title, return_tensors="pt")["input_ids"]
        hidden_ST = model(input_ids=ids).last_hidden_state[0]
        x_T = {"mean": hidden_ST.mean(0), "cls": hidden_ST[0], "last": hidden_ST[-1]}[pooling]
        vectors.append((x_T / x_T.norm()).numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("exact", [False, True])
def test_bert_equals_plain_transformers(tmp_path: Path, pooling: str, exact: bool) -> None:
    folder = tiny_models.bert(tmp_path)
    x_NT = encoder(folder, exact=exact, pooling=pooling, token_budget=64).encode(TITLES)
    np.testing.assert_allclose(x_NT, one_by_one(folder, pooling), atol=2e-6)


def test_a_decoder_is_pooled_at_its_last_token(tmp_path: Path) -> None:
    folder = tiny_models.decoder(tmp_path)
    x_NT = encoder(folder, token_budget=64).encode(TITLES)
    np.testing.assert_allclose(x_NT, one_by_one(folder, "last"), atol=2e-6)


def test_minilm_equals_plain_transformers() -> None:
    folder = find_model("minilm")
    x_NT = encoder(folder).encode(TITLES)
    np.testing.assert_allclose(x_NT, one_by_one(folder, "mean"), atol=2e-6)


def test_minilm_in_bf16_keeps_the_direction() -> None:
    folder = find_model("minilm")
    cosine_N = (encoder(folder, precision="bf16").encode(TITLES) * encoder(folder).encode(TITLES)).sum(1)
    assert cosine_N.mean() > 0.9999 and cosine_N.min() > 0.999


def test_long_texts_are_cut_at_max_tokens(tmp_path: Path) -> None:
    folder = tiny_models.bert(tmp_path)
    cut = encoder(folder, max_tokens=5).encode(["a b c red blue", "a b c dress"])
    np.testing.assert_allclose(cut[0], cut[1], atol=1e-6)  # both are [CLS] a b c [SEP]
    whole = encoder(folder).encode(["a b c red blue", "a b c dress"])
    assert np.abs(whole[0] - whole[1]).max() > 1e-3


def test_no_texts_give_no_rows(tmp_path: Path) -> None:
    assert encoder(tiny_models.bert(tmp_path)).encode([]).shape == (0, 32)


def varied_titles(count: int) -> list[str]:
    words = ["red", "blue", "dress", "shirt", "cotton", "running", "shoes", "women", "leather", "bag", "slim"]
    rng = np.random.default_rng(0)
    return [
        " ".join(rng.choice(words, rng.integers(1, 14))) + f" {n}" for n in range(count)
    ]  # the number makes each unique: equal texts are encoded once


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_exact_batches_give_one_set_of_bytes(precision: str) -> None:
    """Over budgets, orders, subsets and threads; plain batches do not, or this test would show nothing."""
    folder, titles = find_model("minilm"), varied_titles(48)
    shuffled = np.random.default_rng(1).permutation(len(titles)).tolist()

    def digests(exact: bool) -> set[str]:
        found = set()
        for budget, threads, order in (
            (1024, 2, range(len(titles))),
            (1536, 2, shuffled),
            (64, 1, range(len(titles))),
        ):
            torch.set_num_threads(threads)
            encode = encoder(folder, exact=exact, precision=precision, token_budget=budget).encode
            x_NT = np.empty((len(titles), 384), np.float32)
            x_NT[list(order)] = encode([titles[row] for row in order])
            found.add(hashlib.sha256(x_NT.tobytes()).hexdigest())
        return found

    assert len(digests(exact=True)) == 1
    if precision == "bf16":
        assert len(digests(exact=False)) > 1
    subset = encoder(folder, exact=True, precision=precision, token_budget=1024).encode(titles[:7])
    whole = encoder(folder, exact=True, precision=precision, token_budget=1024).encode(titles)
    assert subset.tobytes() == whole[:7].tobytes()


def test_a_subset_keeps_its_vectors_without_exact_batches_too() -> None:
    titles = varied_titles(60)
    encode = encoder(find_model("minilm"), precision="bf16", token_budget=256).encode
    assert (encode(titles)[::5] * encode(titles[::5])).sum(1).min() > 0.9999
