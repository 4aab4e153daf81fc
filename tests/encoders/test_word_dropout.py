"""Texts with words left out."""

from __future__ import annotations

import numpy as np

from prerank_tools.encoders.word_dropout import VARIANTS, draw, shortened


def test_words_go_at_the_given_rate_and_keep_their_order() -> None:
    text = " ".join(f"w{n:03d}" for n in range(400))
    copies = [found[0].split() for found in shortened([text], share=0.3, seed=1)]
    assert len(copies) == VARIANTS and len({tuple(words) for words in copies}) == VARIANTS
    for words in copies:
        assert words == sorted(words) and 240 < len(words) < 320


def test_one_word_stays_and_single_words_and_nothing_are_left_alone() -> None:
    for copy in shortened(["red dress"] * 50 + ["shirt", "", "裙"], share=0.99, seed=0):
        assert set(copy[:50]) == {"red", "dress"}
        assert copy[50:] == ["shirt", "", "裙"]


def test_signs_written_without_blanks_are_left_out_one_by_one() -> None:
    texts = ["红色连衣裙 Nike 2024新款", "ワンピース レッド"] * 30
    copies = shortened(texts, share=0.3, seed=2)[0]
    assert len(set(copies)) > 10
    for text, copy in zip(texts, copies, strict=True):
        left = iter(text)
        assert copy and all(sign in left for sign in copy)  # in order, nothing added
        assert "Nik" not in copy or "Nike" in copy


def test_the_same_seed_leaves_out_the_same_words() -> None:
    texts = ["a b c d e f", "g h i j k l"]
    assert shortened(texts, share=0.5, seed=3) == shortened(texts, share=0.5, seed=3)
    assert shortened(texts, share=0.5, seed=3) != shortened(texts, share=0.5, seed=4)


def test_half_of_the_draws_show_the_whole_text() -> None:
    rows = np.arange(6000)
    found = draw(rows, 3, [42, 0])
    shares = np.bincount(found, minlength=4) / len(rows)
    np.testing.assert_allclose(shares, [1 / 2, 1 / 6, 1 / 6, 1 / 6], atol=0.03)
    assert (found == draw(rows, 3, [42, 0])).all()
    assert (found != draw(rows, 3, [42, 1])).any() and (found != draw(rows + 1, 3, [42, 0])).any()
    assert draw(rows[:0], 3, [42, 0]).shape == (0,)
