"""TF-IDF + SVD: cosines a person would expect, CJK included, and the same bytes at any thread count."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from prerank_tools.encoders.saved_models import load_tfidf, save_tfidf
from prerank_tools.encoders.tfidf import TfidfConfig, fit, terms_of
from prerank_tools.errors import ContractError

TITLES = [
    "red cotton dress",
    "red silk dress",
    "blue denim jeans",
    "blue denim jacket",
    "leather wallet brown",
]
CHINESE = ["红色连衣裙 夏季新款", "夏季红色连衣裙女", "男士真皮钱包", "女士真皮钱包", "蓝色牛仔裤"]


def test_words_and_their_neighbours_or_characters_where_the_script_has_no_blanks() -> None:
    config = TfidfConfig(cjk_ngrams=2)
    assert list(terms_of("Red Dress 2x", config)) == ["red", "dress", "2x", "red dress", "dress 2x"]
    assert list(terms_of("连衣裙", config)) == ["连", "衣", "裙", "连衣", "衣裙"]
    assert list(terms_of("iPhone手机壳", config)) == ["手", "机", "壳", "手机", "机壳", "iphone"]


def test_all_directions_kept_give_the_cosines_of_plain_tfidf() -> None:
    plain = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(TITLES).toarray()
    x_ND = fit(TITLES, TfidfConfig()).encode(TITLES)
    np.testing.assert_allclose(x_ND @ x_ND.T, plain @ plain.T, atol=1e-6)


def test_fewer_directions_are_those_of_scikit_learn_up_to_sign() -> None:
    plain = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(TITLES)
    y_ND = TruncatedSVD(3, algorithm="arpack", random_state=0).fit_transform(plain)
    y_ND /= np.linalg.norm(y_ND, axis=1, keepdims=True)
    x_ND = fit(TITLES, TfidfConfig(dim=3)).encode(TITLES)
    np.testing.assert_allclose(np.abs(x_ND), np.abs(y_ND), atol=1e-5)


def test_two_chinese_titles_of_one_product_are_near_each_other() -> None:
    x_ND = fit(CHINESE, TfidfConfig()).encode(CHINESE)
    cosine = x_ND @ x_ND.T
    assert cosine[0, 1] > 0.5 and cosine[2, 3] > 0.5
    assert cosine[0, 1] > cosine[0, 2:].max()


def test_width_is_what_the_titles_span() -> None:
    assert fit(TITLES, TfidfConfig(dim=128)).dim == 5
    assert fit([*TITLES, *TITLES], TfidfConfig(dim=128)).dim == 5
    assert fit(["one"], TfidfConfig()).encode(["one"]).tolist() == [[1.0]]


def test_unknown_words_give_the_zero_vector_and_known_ones_a_unit_vector() -> None:
    x_ND = fit(TITLES, TfidfConfig()).encode(["zzz", "red zzz"])
    np.testing.assert_allclose(np.linalg.norm(x_ND, axis=1), [0, 1], atol=1e-6)


def test_nothing_to_fit_on_is_an_error() -> None:
    with pytest.raises(ValueError):
        fit(["!", "..."], TfidfConfig())


def test_stored_and_read_again_it_gives_the_same_bytes(tmp_path: Path) -> None:
    model = fit([*TITLES, *CHINESE], TfidfConfig(dim=4))
    save_tfidf(model, tmp_path, template="{title}")
    again = load_tfidf(tmp_path)
    assert again.encode(TITLES).tobytes() == model.encode(TITLES).tobytes()
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".safetensors")]


def test_files_of_two_models_do_not_make_one(tmp_path: Path) -> None:
    save_tfidf(fit(TITLES, TfidfConfig()), tmp_path / "a", template="")
    save_tfidf(fit(CHINESE, TfidfConfig()), tmp_path / "b", template="")
    (tmp_path / "b" / "vocabulary.json").replace(tmp_path / "a" / "vocabulary.json")
    with pytest.raises(ContractError, match="different models"):
        load_tfidf(tmp_path / "a")


SCRIPT = """
import hashlib, numpy as np
from prerank_tools.encoders.tfidf import TfidfConfig, fit
words = [f"w{n}" for n in range(300)]
rng = np.random.default_rng(0)
titles = [" ".join(rng.choice(words, 6)) for _ in range(2000)]
model = fit(titles, TfidfConfig(dim=64))
print(hashlib.sha256(model.components_DV.tobytes() + model.encode(titles).tobytes()).hexdigest())
"""


def test_one_and_two_threads_fit_the_same_bytes() -> None:
    root = str(Path(__file__).parents[2])
    found = set()
    for threads in ("1", "2"):
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        env = {**os.environ, **limits, "PYTHONPATH": root}
        run = [sys.executable, "-c", SCRIPT]
        found.add(subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1 and len(found.pop().strip()) == hashlib.sha256().digest_size * 2
