"""RQ-VAE and RQ-KMeans+: gradients by hand, codes that stay in use, artefacts that give the same codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prerank_tools.quantizers.codebook import load_quantizer
from prerank_tools.quantizers.rkmeans import RKMeans
from prerank_tools.quantizers.rkmeans_plus import RKMeansPlus, RKMeansPlusConfig, RKMeansPlusTraining
from prerank_tools.quantizers.rqvae import RQVAE, _length
from prerank_tools.quantizers.rqvae_net import ResidualCodebooks, RQVAEConfig, RQVAENet, RQVAETraining, rotate
from prerank_tools.quantizers.sid_metrics import Reconstruction, SidCounts

FAST = RQVAETraining(epochs=15, batch_size=128, lr=3e-3, weight_decay=1e-4)


def topics(seed: int, rows: int = 2_000, width: int = 24) -> np.ndarray:
    """Vectors around 40 topics of uneven size, each with its own spread."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(40, width))
    topic = np.minimum(rng.geometric(0.08, rows) - 1, 39)
    x = centre[topic] + rng.normal(size=(rows, width)) * rng.uniform(0.2, 0.6, 40)[topic, None]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def small(**knobs: object) -> RQVAEConfig:
    return RQVAEConfig(**{"sizes": (16, 16), "code_dim": 8, "hidden": (32,), "train": FAST} | knobs)  # type: ignore[arg-type]


def test_losses_are_sums_over_dims() -> None:
    net = RQVAENet(small(codebook="loss"), 6)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.codebooks.codes[0][:, 0] = 2.0
        net.codebooks.codes[1][:, 0] = 3.0
    net.eval()
    x = torch.ones(5, 6)
    found = net(x)
    # e = 0: level 1 leaves (0 - 2)^2 = 4, level 2 (-2 - 3)^2 = 25; each counts 1 + 0.25 times. x_hat = 0.
    assert found["reconstruction"].item() == pytest.approx(6)
    assert found["quantisation"].item() == pytest.approx((4 + 25) * 1.25)


def test_every_level_commits_the_encoder() -> None:
    books = ResidualCodebooks(small(), 8).eval()
    e = torch.randn(4, 8, requires_grad=True)
    _, loss = books(e)
    loss.backward()  # type: ignore[no-untyped-call]
    residual, expected = e.detach(), torch.zeros(4, 8)
    for codes in books.codes:
        residual = residual - codes[torch.cdist(residual, codes).argmin(1)]
        expected = expected + 2 * 0.25 * residual / 4
    torch.testing.assert_close(e.grad, expected)


def test_rotation_trick_gives_q_and_turns_the_gradient_with_it() -> None:
    e = torch.tensor([[2.0, 0.0]], requires_grad=True)
    q = torch.tensor([[0.0, 1.0]])
    z = rotate(e, q)
    torch.testing.assert_close(z.detach(), q)
    z.backward(torch.tensor([[0.0, 1.0]]))  # along q; on e it must be along e, scaled by |q| / |e|
    torch.testing.assert_close(e.grad, torch.tensor([[0.5, 0.0]]))


def test_ema_moves_a_code_to_the_mean_of_its_rows() -> None:
    books = ResidualCodebooks(small(sizes=(2,), sinkhorn=False, dead_below=0, ema_decay=0.5), 2).train()
    books.load([np.array([[0, 0], [10, 0]], np.float32)])
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [9.0, 0.0]])
    books(rows)
    with torch.no_grad():
        books.after_step()
    # Code 0: count (1 + 2) / 2, sum (0 + 4) / 2; code 1: count 1, sum (10 + 9) / 2.
    torch.testing.assert_close(
        books.codes[0].detach()[:, 0], torch.tensor([4 / 3, 9.5]), rtol=1e-4, atol=1e-4
    )


def test_a_dead_code_restarts_on_a_row_of_the_batch() -> None:
    books = ResidualCodebooks(small(sizes=(4,), sinkhorn=False, dead_below=0.5, ema_decay=0.01), 2).train()
    books.load([np.array([[0, 0], [50, 0], [60, 0], [70, 0]], np.float32)])
    rows = torch.randn(64, 2)
    books(rows)
    with torch.no_grad():
        books.after_step()
    assert books.codes[0].abs().max() < 10


def test_sinkhorn_balances_in_training_only() -> None:
    books = ResidualCodebooks(small(sizes=(4,)), 2)
    books.load([np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32)])
    rows = torch.randn(64, 2) * 0.05
    codes = books.codes[0].detach()
    assert books.eval()._choose(rows, codes).bincount(minlength=4).tolist() == [64, 0, 0, 0]
    assert books.train()._choose(rows, codes).bincount(minlength=4).min() > 0


@pytest.mark.parametrize("knobs", [{}, {"estimator": "rotation"}, {"codebook": "loss", "sinkhorn": False}])
def test_codes_stay_in_use_and_reconstruct(knobs: dict[str, object]) -> None:
    x = topics(0)
    fitted = RQVAE(small(**knobs)).fit(x, seed=0, threads=1)
    codes = fitted.encode(x, threads=1)
    counts = SidCounts(fitted.sizes)
    counts.update(codes)
    assert all(level.used >= 0.9 * 16 and level.perplexity >= 8 for level in counts.finalize().levels)
    error = Reconstruction()
    error.update(x, fitted.decode(codes))
    assert error.finalize()["relative_error"] < 0.6


@pytest.mark.parametrize("kind", [RQVAE, RKMeansPlus])
def test_a_saved_quantizer_gives_the_same_codes_in_any_batch(tmp_path: Path, kind: type[RQVAE]) -> None:
    x = topics(1, rows=700)
    fitted = kind(small(train=FAST.model_copy(update={"epochs": 1}))).fit(x, seed=3, threads=1)
    fitted.to_codebook().save(tmp_path)
    again = load_quantizer(tmp_path)
    assert type(again) is kind and again.sizes == (16, 16) and again.width == 24
    codes = fitted.encode(x, threads=1)
    np.testing.assert_array_equal(again.encode(x, threads=2), codes)
    np.testing.assert_array_equal(np.concatenate([again.encode(row[None]) for row in x[:20]]), codes[:20])
    np.testing.assert_array_equal(again.decode(codes), fitted.decode(codes))
    assert again.to_codebook().fingerprint == fitted.to_codebook().fingerprint


def test_untrained_rkmeans_plus_is_rkmeans() -> None:
    x = topics(2)
    net = RQVAENet(RKMeansPlusConfig(sizes=(16, 16)), 24, skip=True)
    plus = RKMeansPlus(RKMeansPlusConfig(sizes=(16, 16)), net)
    plus._init_codebooks(torch.from_numpy(x), seed=0, threads=1)
    plain = RKMeans(sizes=(16, 16)).fit(x, seed=0, threads=1)
    codes = plus.encode(x, threads=1)
    np.testing.assert_array_equal(codes, plain.encode(x))
    np.testing.assert_allclose(plus.decode(codes), plain.decode(codes), atol=1e-6)


def test_a_progressive_start_lowers_the_error_where_residuals_have_outliers() -> None:
    x = topics(5, rows=4_000)
    x[::50] *= 3
    errors = []
    for start in ("random", "progressive"):
        error = Reconstruction()
        fitted = RKMeans(sizes=(32, 32, 32), init=start).fit(x, seed=0, threads=1)  # type: ignore[arg-type]
        error.update(x, fitted.decode(fitted.encode(x)))
        errors.append(error.finalize()["relative_error"])
    assert errors[1] < errors[0]


def test_rkmeans_plus_lowers_the_error_it_began_with() -> None:
    x = topics(3)
    train = RKMeansPlusTraining(epochs=10, batch_size=128, lr=3e-3, weight_decay=1e-4)
    config = RKMeansPlusConfig(sizes=(16, 16), hidden=(64,), train=train)
    errors = []
    for fitted in (RKMeans(sizes=(16, 16)), RKMeansPlus(config)):
        error = Reconstruction()
        error.update(x, fitted.fit(x, seed=0, threads=1).decode(fitted.encode(x)))
        errors.append(error.finalize()["relative_error"])
    assert errors[1] < errors[0]


def test_the_same_seed_trains_the_same_codebook() -> None:
    x = topics(4, rows=600)
    one, two = (RQVAE(small()).fit(x, seed=7, threads=1).to_codebook().fingerprint for _ in range(2))
    assert one == two


def test_a_kind_keeps_its_own_training_defaults_beside_what_is_set() -> None:
    config = RKMeansPlusConfig(**{"train": {"steps": 7}})  # type: ignore[arg-type]
    assert (config.train.steps, config.train.lr) == (7, RKMeansPlusTraining().lr)


def test_training_takes_its_steps_whatever_the_rows() -> None:
    config = RQVAETraining(steps=120, batch_size=100)
    assert _length(1, config) == (50, 3)
    assert _length(30, config) == (2, 2)
    assert _length(1_000, config) == (1, 1)
    assert _length(30, RQVAETraining(epochs=7)) == (1, 7)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_no_level_collapses_in_any_seed(seed: int) -> None:
    x = topics(seed, rows=6_000, width=48)
    train = RQVAETraining(steps=200, batch_size=512, lr=1e-3, weight_decay=1e-4, schedule="cosine")
    fitted = RQVAE(RQVAEConfig(sizes=(64, 64, 64), code_dim=16, hidden=(64,), train=train))
    codes = fitted.fit(x, seed=seed, threads=2).encode(x)
    counts = SidCounts(fitted.sizes)
    counts.update(codes)
    for level in counts.finalize().levels:
        assert level.used >= 0.9 * 64 and level.perplexity >= 32
