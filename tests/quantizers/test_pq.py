"""Product quantization: slices, the rotation, and codes that do not depend on the batch."""

from __future__ import annotations

import numpy as np

from prerank_tools.quantizers.codebook import quantizer_of
from prerank_tools.quantizers.pq import ProductQuantizer


def correlated(rows: int, dims: int = 12) -> np.ndarray:
    """Variance in a few directions that no axis has for itself."""
    rng = np.random.default_rng(0)
    turn_DD, _ = np.linalg.qr(rng.standard_normal((dims, dims)))
    spread_D = 1.0 / np.arange(1, dims + 1)
    return (rng.standard_normal((rows, dims)) * spread_D @ turn_DD).astype(np.float32)


def error(quantizer: ProductQuantizer, x_ND: np.ndarray) -> float:
    return float(((x_ND - quantizer.decode(quantizer.encode(x_ND))) ** 2).sum() / (x_ND**2).sum())


def test_plain_slices_are_quantized_apart() -> None:
    x_ND = correlated(1_000)
    fitted = ProductQuantizer(sizes=(16, 16, 16), iterations=10, rotate=False).fit(x_ND)
    codes_NL = fitted.encode(x_ND)
    for level, slice_NW in enumerate(np.split(x_ND, 3, axis=1)):
        distance_NK = ((slice_NW[:, None] - fitted.codebooks[level]) ** 2).sum(-1)
        np.testing.assert_array_equal(codes_NL[:, level], distance_NK.argmin(1))


def test_the_rotation_helps_and_is_one() -> None:
    x_ND = correlated(3_000)
    plain = ProductQuantizer(sizes=(16, 16, 16), iterations=10, rotate=False).fit(x_ND)
    turned = ProductQuantizer(sizes=(16, 16, 16), iterations=10).fit(x_ND)
    assert error(turned, x_ND) < error(plain, x_ND)
    np.testing.assert_allclose(turned.rotation_DD @ turned.rotation_DD.T, np.eye(12), atol=1e-4)


def test_a_width_that_levels_do_not_divide() -> None:
    x_ND = correlated(500, dims=10)
    fitted = ProductQuantizer(sizes=(8, 8, 8), iterations=5).fit(x_ND)
    assert fitted.decode(fitted.encode(x_ND)).shape == (500, 10)
    again = quantizer_of(fitted.to_codebook())
    np.testing.assert_array_equal(again.encode(x_ND), fitted.encode(x_ND))


def test_codes_do_not_depend_on_the_batch() -> None:
    x_ND = correlated(700)
    fitted = ProductQuantizer(sizes=(16, 16), iterations=5).fit(x_ND)
    one_by_one = np.concatenate([fitted.encode(x_ND[n : n + 1]) for n in range(50)])
    np.testing.assert_array_equal(one_by_one, fitted.encode(x_ND)[:50])
