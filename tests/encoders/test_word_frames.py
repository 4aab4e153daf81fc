"""Texts put together from a table of words against the tokenizer's own ids, on the strangest texts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from prerank_tools.encoders import word_frames
from prerank_tools.encoders.batches import Tokens
from prerank_tools.encoders.model_folder import find_model
from prerank_tools.encoders.transformers_models import load_tokenizer
from prerank_tools.encoders.word_frames import WORD_BYTES, WordTable
from tests.encoders import tiny_models

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    *"abcdefgxyzABC019.,-'#/&éßσς红色连裙夏",
    *(f"##{c}" for c in "abcdefgxyz019éσς"),
    "dress",
    "##es",
    "sho",
]

# What a catalogue's titles may hold, and what could tell a word alone from a word among others.
NASTY = st.sampled_from(
    [
        *[
            "red",
            "dress",
            "Shoes",
            "42.5",
            "[SEP]",
            "[CLS]x",
            "x[MASK]",
            "[PAD",
            "sep]",
            "nike",
            "Nike",
            "<mask>",
        ],
        *[
            " ",
            "  ",
            "\t",
            "\n",
            "\r\n",
            "\u00a0",
            "\u2003",
            "\u3000",
            "\u2028",
            "\u0085",
            "\u200b",
            "\ufeff",
        ],
        *[
            "\u0301",
            "\u0300\u0323",
            "e\u0301",
            "İ",
            "ß",
            "ﬁ",
            "Å",
            "ſ\u0307",
            "ΟΔΟΣ",
            "Σ",
            "\uac01",
            "\u1100\u1161",
        ],
        *[
            "红",
            "色连衣裙",
            "㐀",
            "\U00020000",
            "豈",
            "。",
            "，",
            "夏\u0301",
            "かな",
            "👗",
            "👍🏽",
            "👨‍👩‍👧",
            "🇩🇪",
        ],
        *[
            "\x00",
            "\x07",
            "\ufffd",
            "\u00ad",
            "\u202e",
            "\ue000",
            "¨",
            "\u00b4",
            "``",
            "-",
            "…",
            "'s",
            "w" * 120,
        ],
    ]
)
TEXT = st.lists(NASTY | st.text(max_size=6), max_size=12).map("".join)
TEXTS = st.lists(TEXT, min_size=1, max_size=6)


def bert_like(
    model: Any, normalizer: Any, *, pre: Any = None, post: Any = None, added: Any = ()
) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre or pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = post or processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(list(added))
    return tokenizer


def word_pieces() -> Any:
    vocabulary = {piece: n for n, piece in enumerate([*SPECIAL, *PIECES])}
    return models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=20)


def tokenizer_named(name: str) -> Tokenizer:
    bert, replaced = normalizers.BertNormalizer, normalizers.Sequence
    words = {word: n for n, word in enumerate([*SPECIAL, *PIECES])}
    framed = processors.TemplateProcessing(
        single="[CLS] [CLS] $A [SEP] [MASK]", special_tokens=[("[CLS]", 2), ("[SEP]", 3), ("[MASK]", 4)]
    )
    added = ["nike", AddedToken("<mask>", lstrip=True, rstrip=True), "es-"]
    made = {
        "minilm": lambda: AutoTokenizer.from_pretrained(find_model("minilm")).backend_tokenizer,
        "cased, ideographs kept": lambda: bert_like(
            word_pieces(), bert(lowercase=False, strip_accents=False, handle_chinese_chars=False)
        ),
        "composed, then lower": lambda: bert_like(
            word_pieces(),
            replaced([normalizers.NFKC(), normalizers.Lowercase(), normalizers.StripAccents()]),
            pre=pre_tokenizers.Whitespace(),
        ),
        "added words": lambda: bert_like(word_pieces(), bert(), added=added),
        "words, no normaliser, longer frame": lambda: bert_like(
            models.WordLevel(words, unk_token="[UNK]"),
            None,
            pre=pre_tokenizers.WhitespaceSplit(),
            post=framed,
        ),
    }
    return made[name]()


NAMES = (
    "minilm",
    "cased, ideographs kept",
    "composed, then lower",
    "added words",
    "words, no normaliser, longer frame",
)


@cache
def pair(name: str) -> tuple[Tokenizer, WordTable]:
    tokenizer = tokenizer_named(name)
    table = WordTable.of(tokenizer)
    assert table is not None
    return tokenizer, table


def library(tokenizer: Tokenizer, texts: list[str], max_tokens: int) -> list[list[int]]:
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def as_lists(tokens: Tokens) -> list[list[int]]:
    spans = zip(tokens.starts_N, tokens.lengths_N, strict=True)
    return [tokens.flat[start : start + length].tolist() for start, length in spans]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, deadline=None)
@given(texts=TEXTS, max_tokens=st.sampled_from([4, 5, 9, 256]))
def test_every_text_gets_the_tokenizers_own_ids(name: str, texts: list[str], max_tokens: int) -> None:
    tokenizer, table = pair(name)
    assert as_lists(table(texts, max_tokens=max_tokens)) == library(tokenizer, texts, max_tokens)


def test_no_texts_are_no_tokens() -> None:
    assert as_lists(pair("added words")[1]([], max_tokens=8)) == []


def test_a_full_table_begins_anew_and_stays_right() -> None:
    tokenizer = tokenizer_named("added words")
    table = WordTable(tokenizer, [2], [3], parts_ideographs=True, held_bytes=4 * WORD_BYTES)
    for texts in (["red dress"], ["xyz shoes nike"], ["a b c d e f g", "red"], ["red dress"]):
        assert as_lists(table(texts, max_tokens=16)) == library(tokenizer, texts, 16)
        assert len(table._row_of) <= max(4, len(set(" ".join(texts).split())))


class Watched:
    """Counts the words that reach the tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.seen = tokenizer, list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode_batch_fast(self, words: list[str], **how: bool) -> Any:
        self.seen += words
        return self.tokenizer.encode_batch_fast(words, **how)


def test_a_word_is_tokenised_once() -> None:
    watched = Watched(tokenizer_named("added words"))
    table = WordTable(watched, [2], [3], parts_ideographs=True)
    for texts in (["red dress red", "dress 红色"], ["dress red 色 blue"]):
        table(texts, max_tokens=8)
    assert sorted(watched.seen) == ["", "blue", "dress", "red", "红", "色"]


BERT = normalizers.BertNormalizer()
REFUSED = {
    "another model": lambda: Tokenizer(models.BPE()),
    "no split at blanks": lambda: bert_like(word_pieces(), BERT, pre=pre_tokenizers.Punctuation()),
    "blanks as characters": lambda: bert_like(word_pieces(), BERT, pre=pre_tokenizers.Metaspace()),
    "a normaliser that could join": lambda: bert_like(word_pieces(), normalizers.Replace(" ", "")),
    "an added word with a blank": lambda: bert_like(word_pieces(), BERT, added=["new york"]),
    "an added word of ideographs": lambda: bert_like(word_pieces(), BERT, added=["红色"]),
    "an added word that looks around": lambda: bert_like(
        word_pieces(), BERT, added=[AddedToken("nike", single_word=True)]
    ),
    "a frame with the text twice": lambda: bert_like(
        word_pieces(),
        BERT,
        post=processors.TemplateProcessing(single="$A [SEP] $A", special_tokens=[("[SEP]", 3)]),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_work_by_words_is_left_to_the_library(what: str) -> None:
    assert WordTable.of(REFUSED[what]()) is None


def test_the_trial_refuses_what_settings_do_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_frames, "frame_of", lambda post: ([2], []))
    assert WordTable.of(tokenizer_named("added words")) is None


def test_a_loaded_tokeniser_uses_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_models.bert(tmp_path), None)
    texts = ["red dress", "", "shoe for 红色 women zzz"]
    assert tokenizer.words is not None
    assert as_lists(tokenizer.tokens(texts, max_tokens=5)) == tokenizer.ids_of(texts, max_tokens=5)
