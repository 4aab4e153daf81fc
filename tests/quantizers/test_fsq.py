"""Last-level FSQ: digits by hand, a decoding table that equals the decoder, even use from the start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from prerank_tools.quantizers.codebook import load_quantizer
from prerank_tools.quantizers.fsq import FSQConfig, FSQNet, FSQTraining, RKMeansFSQ
from prerank_tools.quantizers.rkmeans import RKMeans
from prerank_tools.quantizers.sid_metrics import Reconstruction, SidCounts

FAST = FSQTraining(epochs=5, batch_size=256, lr=1e-3)


def vectors(rows: int = 1_500) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 16))[rng.integers(0, 20, rows)] + 0.4 * rng.normal(size=(rows, 16))
    return x.astype(np.float32)


def test_digits_are_equal_bins_of_minus_one_to_one() -> None:
    net = FSQNet(4, (2, 3), hidden=4)
    scalars = torch.tensor([[-1.0, -1.0], [-0.01, -0.34], [0.01, -0.3], [0.99, 0.4], [1.0, 1.0]])
    assert net.digits_of(scalars).tolist() == [[0, 0], [0, 0], [1, 1], [1, 2], [1, 2]]
    torch.testing.assert_close(
        net.centres(torch.tensor([[0, 0], [1, 1], [1, 2]])),
        torch.tensor([[-0.5, -2 / 3], [0.5, 0.0], [0.5, 2 / 3]]),
    )


def test_principal_axes_use_every_binary_code_evenly() -> None:
    residual = torch.randn(4_000, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)
    net = FSQNet(12, (2,) * 4, hidden=8)
    net.start_from(residual)
    digits = net.digits_of(net.scalars(residual))
    codes = digits @ torch.tensor([8, 4, 2, 1])
    assert codes.bincount(minlength=16).min() > 180  # 250 each if perfectly even


def test_fsq_fits_saves_and_decodes_by_its_table(tmp_path: Path) -> None:
    x = vectors()
    fitted = RKMeansFSQ(FSQConfig(sizes=(16,), digits=(2, 3, 3), hidden=16, train=FAST)).fit(x, threads=1)
    assert fitted.sizes == (16, 18)
    codes = fitted.encode(x, threads=1)
    fitted.to_codebook().save(tmp_path)
    again = load_quantizer(tmp_path)
    np.testing.assert_array_equal(again.encode(x), codes)
    np.testing.assert_array_equal(again.decode(codes), fitted.decode(codes))
    digits = np.stack([codes[:, 1] // 9, codes[:, 1] // 3 % 3, codes[:, 1] % 3], axis=1).astype(np.int64)
    assert fitted.net is not None
    with torch.no_grad():
        restored = fitted.net.restore(fitted.net.centres(torch.from_numpy(digits))).numpy()
    np.testing.assert_allclose(fitted.decode(codes), fitted.means[0][codes[:, 0]] + restored, atol=1e-5)


def test_fsq_lowers_the_error_of_the_levels_above_and_parts_more_items() -> None:
    x = vectors()
    above = RKMeans(sizes=(16,)).fit(x, threads=1)
    fitted = RKMeansFSQ(FSQConfig(sizes=(16,), digits=(2,) * 6, hidden=16, train=FAST)).fit(x, threads=1)
    errors = []
    for quantizer in (above, fitted):
        error = Reconstruction()
        error.update(x, quantizer.decode(quantizer.encode(x)))
        errors.append(error.finalize()["relative_error"])
    assert errors[1] < 0.8 * errors[0]
    counts = SidCounts(fitted.sizes)
    counts.update(fitted.encode(x))
    assert counts.finalize().levels[1].perplexity > 40
