"""Texts with words left out: what an encoder is shown so that it relies on no single one (ours)."""

# C contents, V variants of a text, B rows of one batch

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

# A word stands between blanks; Han and kana, written without blanks, count sign by sign, as BERT reads them.
_SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"(\s*)([{_SIGNS}]|[^\s{_SIGNS}]+)")
VARIANTS = 3  # shortened copies of each text, made once; half of the draws show the whole text


def shortened(texts: Sequence[str], *, share: float, seed: int) -> list[list[str]]:
    """VARIANTS lists like `texts`, with about `share` of each one's words left out, never all."""
    return [
        [leave_out(text, share, [seed, copy, row]) for row, text in enumerate(texts)]
        for copy in range(VARIANTS)
    ]


def leave_out(text: str, share: float, seed: Sequence[int]) -> str:
    """The text less each word with probability `share`; one word at least stays."""
    words = [(" " if blank else "") + word for blank, word in WORD.findall(text)]
    if len(words) < 2:
        return text
    dice = np.random.default_rng(seed).random(len(words))
    dice[dice.argmax()] = 1.0
    return "".join(word for word, value in zip(words, dice, strict=True) if value >= share).strip()


def draw(rows_B: np.ndarray, variants: int, seed: Sequence[int]) -> np.ndarray:
    """Which variant each row is shown: 0, the whole text, for half of them, else one of 1 .. V."""
    dice = np.random.default_rng([*seed, *rows_B[:1].tolist()])
    found_B = dice.integers(1, variants + 1, len(rows_B))
    return np.where(dice.random(len(rows_B)) < 0.5, found_B, 0)
