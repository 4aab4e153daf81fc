"""The random-hash control: even, repeatable, and without meaning."""

from __future__ import annotations

import numpy as np

from prerank_tools.quantizers.codebook import quantizer_of
from prerank_tools.quantizers.random_hash import RandomHash


def test_codes_are_even_and_follow_the_bytes_alone() -> None:
    x_ND = np.random.default_rng(0).standard_normal((6_000, 8)).astype(np.float32)
    x_ND[1] = x_ND[0]
    control = RandomHash(sizes=(16, 4)).fit(x_ND)
    codes_NL = control.encode(x_ND)
    assert (codes_NL[0] == codes_NL[1]).all()
    for level, size in enumerate((16, 4)):
        counts_K = np.bincount(codes_NL[:, level], minlength=size)
        expected = len(x_ND) / size
        chi_square = ((counts_K - expected) ** 2 / expected).sum()
        assert chi_square < size - 1 + 5 * np.sqrt(2 * (size - 1))
    joint = np.bincount(codes_NL[:, 0] * 4 + codes_NL[:, 1], minlength=64)
    assert joint.min() > 0.5 * len(x_ND) / 64
    close_ND = x_ND + np.float32(1e-6)
    assert 0.03 < (control.encode(close_ND)[:, 0] == codes_NL[:, 0]).mean() < 0.1


def test_seed_and_saving() -> None:
    x_ND = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    control = RandomHash(sizes=(16, 4)).fit(x_ND, seed=5)
    again = quantizer_of(control.to_codebook())
    np.testing.assert_array_equal(again.encode(x_ND), control.encode(x_ND))
    np.testing.assert_allclose(again.decode(control.encode(x_ND))[0], x_ND.mean(0), atol=1e-6)
    assert (RandomHash(sizes=(16, 4)).fit(x_ND).encode(x_ND) != control.encode(x_ND)).any()
