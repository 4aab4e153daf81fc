"""Tokenise each distinct word once, and put texts together from a table of their words' ids.

Tokenisers of the BERT family look at what stands between two blanks by itself, so a text's ids are those of
its words one after another, cut and framed. Catalogues use few words many times.
"""

# N texts, M words of all texts, U distinct ones, K words of the table, F ids of all texts

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from prerank_tools.encoders.batches import Tokens

# None of these joins what a blank parts: no canonical or compatibility composition begins with one.
NORMALIZERS = {"BertNormalizer", "Lowercase", "StripAccents", "NFC", "NFD", "NFKC", "NFKD"}
PRE_TOKENIZERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
MODELS = {"WordPiece", "WordLevel"}
IDEOGRAPHS = "[\u4e00-\u9fff]"  # BertNormalizer puts blanks around them: parted beforehand they are few words
HELD_BYTES, WORD_BYTES = 64 << 20, 150  # a table's memory, and that of a word beside its characters
TRIALS = (
    "",
    " ",
    "Nike Air-Max 90, size 42.5",
    "Éclair cafe\u0301 I\u0307 \u0301x \ufb01n ΟΔΟΣ ΣΑΣ",
    "红色dress 连衣裙\u3000夏\u0301 \uac00\u1100\u1161",
    "a\tb\nc\u00a0d\u2028e\u200bf\x00g\ufffdh\u00adi",
    "👗👟 x👍🏽y [SEP][CLS] [MASK]x [PAD] [ SEP ] <s></s><mask>",
    "w" * 120 + " " + "ab " * 40,
)


@dataclass
class WordTable:
    """Texts -> Tokens, equal to the tokenizer's own at any cut; it remembers words from call to call.

    `prefix` and `suffix` are the ids around a text; `parts_ideographs` says that the tokenizer treats each
    ideograph as a word. Not for several threads at once.
    """

    tokenizer: Any
    prefix: Sequence[int]
    suffix: Sequence[int]
    parts_ideographs: bool
    held_bytes: int = HELD_BYTES
    _row_of: dict[str, int] = field(default_factory=dict, repr=False)
    _ids: Tokens = field(default_factory=lambda: Tokens.of([]), repr=False)
    _held: int = 0

    @classmethod
    def of(cls, tokenizer: Any) -> WordTable | None:
        """The table of a `tokenizers.Tokenizer`; None where words by themselves may not give its very ids.

        Its parts are read off its settings and tried on difficult texts.
        """
        if type(tokenizer.model).__name__ not in MODELS:
            return None
        state = json.loads(tokenizer.to_str())
        frame = frame_of(state["post_processor"])
        if frame is None or not works_by_word(state):
            return None
        found = cls(tokenizer, *frame, parts_ideographs(state["normalizer"]))
        return found if all(found.agrees(max_tokens) for max_tokens in (8, 256)) else None

    def agrees(self, max_tokens: int) -> bool:
        """Does it give the tokenizer's ids of the trial texts?"""
        ours = self(TRIALS, max_tokens=max_tokens)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens)
        theirs = Tokens.of([encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(TRIALS))])
        return np.array_equal(ours.lengths_N, theirs.lengths_N) and np.array_equal(ours.flat, theirs.flat)

    def __call__(self, texts: Sequence[str], *, max_tokens: int) -> Tokens:
        """The ids of each text, framed, `max_tokens` at most."""
        words = pl.Series("word", texts, dtype=pl.String)
        if self.parts_ideographs:
            words = words.str.replace_all(IDEOGRAPHS, " $0 ")
        words = words.str.split(" ")
        words_N = words.list.len().to_numpy().astype(np.int64)
        rows_M = self._rows(words.explode(empty_as_null=False, keep_nulls=False))
        counts_M = self._ids.lengths_N[rows_M]
        before_M = np.cumsum(counts_M) - counts_M
        first_N = np.cumsum(words_N) - words_N
        kept_N = np.minimum(
            np.add.reduceat(counts_M, first_N), max_tokens - len(self.prefix) - len(self.suffix)
        )
        left_M = np.repeat(kept_N + before_M[first_N], words_N) - before_M  # ids until the text is cut
        counts_M = np.clip(left_M, 0, counts_M)
        flat = self._ids.flat[ranges(self._ids.starts_N[rows_M], counts_M)]
        return framed(flat, kept_N, self.prefix, self.suffix)

    def _rows(self, words: pl.Series) -> np.ndarray:
        """Where in the table each word is."""
        groups = words.to_frame().with_row_index("at").group_by("word").agg("at")
        rows_U = self._known(groups["word"].to_list())
        rows_M = np.empty(len(words), np.int64)
        rows_M[groups["at"].explode().to_numpy()] = np.repeat(rows_U, groups["at"].list.len().to_numpy())
        return rows_M

    def _known(self, words: list[str]) -> np.ndarray:
        """Rows of distinct words, after those not yet in the table were added; a full one begins anew."""
        new = [word for word in words if word not in self._row_of]
        if self._held + held_by(new) > self.held_bytes:
            self._row_of, self._ids, self._held, new = {}, Tokens.of([]), 0, words
        if new:
            self._learn(new)
        return np.fromiter((self._row_of[word] for word in words), np.int64, len(words))

    def _learn(self, words: list[str]) -> None:
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        encodings = self.tokenizer.encode_batch_fast(words, add_special_tokens=False)
        new = Tokens.of([encoding.ids for encoding in encodings])
        self._row_of.update(zip(words, range(len(self._row_of), len(self._row_of) + len(words)), strict=True))
        lengths_K = np.concatenate([self._ids.lengths_N, new.lengths_N])
        self._ids = Tokens(
            np.concatenate([self._ids.flat, new.flat]), np.cumsum(lengths_K) - lengths_K, lengths_K
        )
        self._held += held_by(words)


def held_by(words: Sequence[str]) -> int:
    """Bytes that words take in a table, about."""
    return sum(map(len, words)) + WORD_BYTES * len(words)


def ranges(starts_M: np.ndarray, counts_M: np.ndarray) -> np.ndarray:
    """start, start + 1 ... of each range, one range after another."""
    ends_M = np.cumsum(counts_M)
    total = int(ends_M[-1]) if len(ends_M) else 0
    return np.arange(total) + np.repeat(starts_M - ends_M + counts_M, counts_M)


def framed(flat: np.ndarray, counts_N: np.ndarray, prefix: Sequence[int], suffix: Sequence[int]) -> Tokens:
    """Tokens of texts whose ids stand end to end, each between `prefix` and `suffix`."""
    lengths_N = counts_N + len(prefix) + len(suffix)
    ends_N = np.cumsum(lengths_N)
    starts_N = ends_N - lengths_N
    ids_F = np.empty(int(lengths_N.sum()), np.int64)
    inner_F = np.ones(len(ids_F), bool)
    for at, token in enumerate(prefix):
        ids_F[starts_N + at], inner_F[starts_N + at] = token, False
    for at, token in enumerate(suffix):
        ids_F[ends_N - len(suffix) + at], inner_F[ends_N - len(suffix) + at] = token, False
    ids_F[inner_F] = flat
    return Tokens(ids_F, starts_N, lengths_N)


# Which tokenizers work by words


def works_by_word(state: Mapping[str, Any]) -> bool:
    """Do normaliser and pre-tokenizer part texts at blanks, and do added tokens lie within words?"""
    normalizers = {step["type"] for step in steps(state["normalizer"], "normalizers")}
    split = {step["type"] for step in steps(state["pre_tokenizer"], "pretokenizers")}
    return (
        normalizers <= NORMALIZERS
        and bool(split & PRE_TOKENIZERS)
        and split <= PRE_TOKENIZERS
        and all(
            # Others could begin or end with what a normaliser puts between words, or look beyond their word.
            token["content"].isascii()
            and token["content"].isprintable()
            and " " not in token["content"]
            and not token["single_word"]
            for token in state["added_tokens"]
        )
    )


def steps(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The steps of a part of a tokenizer's settings: of a sequence each, else itself."""
    if part is None:
        return []
    return (
        [step for inner in part[name] for step in steps(inner, name)]
        if part["type"] == "Sequence"
        else [part]
    )


def parts_ideographs(normalizer: Mapping[str, Any] | None) -> bool:
    """Does the first step put blanks around ideographs?"""
    first = steps(normalizer, "normalizers")[:1]
    return any(step["type"] == "BertNormalizer" and step["handle_chinese_chars"] for step in first)


def frame_of(post: Mapping[str, Any] | None) -> tuple[list[int], list[int]] | None:
    """The ids before and after a single text; None where that is not all that is done to it."""
    if post is None:
        return [], []
    if post["type"] in ("BertProcessing", "RobertaProcessing"):
        return [post["cls"][1]], [post["sep"][1]]
    if post["type"] != "TemplateProcessing":
        return None
    kinds = ["Sequence" if "Sequence" in piece else piece["SpecialToken"]["id"] for piece in post["single"]]
    if kinds.count("Sequence") != 1:
        return None
    at = kinds.index("Sequence")
    before, after = (
        [token for kind in part for token in post["special_tokens"][kind]["ids"]]
        for part in (kinds[:at], kinds[at + 1 :])
    )
    return before, after
