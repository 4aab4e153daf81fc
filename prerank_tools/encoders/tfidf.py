"""TF-IDF + SVD: text vectors that need no weights, fitted once on the catalogue and stored without pickle."""

# N texts, V terms, D output dims

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

# Scripts written without spaces: Han, kana, and Hangul, whose words carry their particles with them.
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0002fa1f"
TOKEN = re.compile(f"[{CJK}]+|[^\\W{CJK}]+")
STARTS_CJK = re.compile(f"[{CJK}]")


class TfidfConfig(BaseModel):
    """What is counted and how many dimensions are kept; defaults are ours."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(default=128, ge=1)  # fewer where the catalogue does not span as many
    max_terms: int = Field(default=50_000, ge=1)  # the most frequent ones
    min_items: int = Field(default=1, ge=1)  # a term of fewer items is left out
    word_ngrams: int = Field(default=2, ge=1, le=4)
    cjk_ngrams: int = Field(default=3, ge=1, le=5)  # characters, within a run of CJK text
    fit_items: int = Field(default=200_000, ge=1)  # larger catalogues are fitted on this many items
    seed: int = 42


@dataclass(frozen=True)
class Tfidf:
    """A fitted model: terms in column order, their weights, and the directions kept."""

    config: TfidfConfig
    terms: Sequence[str]
    idf_V: np.ndarray  # float64
    components_DV: np.ndarray  # float32

    @property
    def dim(self) -> int:
        return len(self.components_DV)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors x_ND in float32; the zero vector for a text without any known term."""
        counts_NV = self._vectorizer().transform(texts)
        with threadpool_limits(1):
            x_ND = np.asarray(counts_NV @ self.components_DV.T.astype(np.float64))
        norm_N = np.linalg.norm(x_ND, axis=1, keepdims=True)
        return np.divide(x_ND, norm_N, out=np.zeros_like(x_ND), where=norm_N > 1e-9).astype(np.float32)

    def _vectorizer(self) -> TfidfVectorizer:
        vocabulary: Mapping[str, int] = {term: column for column, term in enumerate(self.terms)}
        vectorizer = TfidfVectorizer(
            analyzer=lambda text: terms_of(text, self.config), vocabulary=vocabulary, sublinear_tf=True
        )
        vectorizer.idf_ = self.idf_V
        return vectorizer


def fit(texts: Sequence[str], config: TfidfConfig) -> Tfidf:
    """Fit on the texts; the same bytes for the same texts at any thread count.

    Raises ValueError when no text holds any term.
    """
    counter = CountVectorizer(
        analyzer=lambda text: terms_of(text, config), min_df=config.min_items, max_features=config.max_terms
    )
    weighting = TfidfTransformer(sublinear_tf=True)
    weights_NV = weighting.fit_transform(counter.fit_transform(texts))
    components_DV = principal_directions(weights_NV, config.dim, seed=config.seed)
    terms = counter.get_feature_names_out().tolist()
    return Tfidf(config, terms, weighting.idf_, components_DV.astype(np.float32))


def terms_of(text: str, config: TfidfConfig) -> Iterator[str]:
    """Character n-grams of CJK runs; lower-case words, and n-grams of neighbouring words, of all other text.

    Word analysis alone takes a Chinese title for one word, so that two titles of one product share nothing.
    """
    words: list[str] = []
    for token in TOKEN.findall(text.lower()):
        if STARTS_CJK.match(token):
            yield from ngrams(token, config.cjk_ngrams, "")
            yield from ngrams(words, config.word_ngrams, " ")
            words = []
        else:
            words.append(token)
    yield from ngrams(words, config.word_ngrams, " ")


def ngrams(tokens: Sequence[str], longest: int, joint: str) -> Iterator[str]:
    """Runs of 1 to `longest` neighbouring tokens."""
    for n in range(1, longest + 1):
        for start in range(len(tokens) - n + 1):
            yield joint.join(tokens[start : start + n])


def principal_directions(weights_NV: sparse.csr_matrix, dim: int, *, seed: int) -> np.ndarray:
    """Right singular vectors (D, V) of the `dim` largest singular values, those that are nought left out.

    One BLAS thread, because float64 sums differ between one and two; signs fixed by the largest loading.
    """
    dim = min(dim, *weights_NV.shape)
    with threadpool_limits(1):
        _, scale_D, components_DV = randomized_svd(weights_NV, dim, n_iter=7, random_state=seed)
    components_DV = components_DV[scale_D > 1e-6 * scale_D[0]]
    largest_D = np.abs(components_DV).argmax(axis=1)
    return components_DV * np.sign(components_DV[np.arange(len(components_DV)), largest_D])[:, None]
