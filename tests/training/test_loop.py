"""The training loop: what it computes, and that a kill does not change it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from prerank_tools.errors import ConflictError, PrerankError, UsageError
from prerank_tools.training import checkpoints
from prerank_tools.training.loop import TrainConfig, train

TOY = Path(__file__).with_name("toy.py")


def _load_toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_toy", TOY)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = _load_toy()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def launch(folder: Path, *, kill_at: int = -1, dropout: float = 0.2) -> None:
    """Train the toy in two processes; `kill_at` is the step at which both kill themselves with SIGKILL."""
    folder.mkdir(exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*torchrun, str(TOY), str(folder), str(kill_at), str(dropout)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode == 0) == (kill_at < 0), done.stderr[-4000:]


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_loss_falls_and_metrics_are_written(tmp_path: Path) -> None:
    result = train(toy.toy(0.0), toy.Rows(), config=TrainConfig(epochs=4, lr=0.02), folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["step"] == result.steps == 20
    assert lines == result.history
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


def test_epoch_mean_counts_rows_not_batches(tmp_path: Path) -> None:
    model = toy.toy(0.0)
    rows = toy.Rows()
    with torch.no_grad():
        expected = (model.body(rows.x).squeeze(1) - rows.y).square().mean().item()
    result = train(model, rows, config=TrainConfig(lr=1e-12, weight_decay=0), folder=tmp_path)
    assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_one_step_is_adamw(tmp_path: Path) -> None:
    model, by_hand = toy.toy(0.0), toy.toy(0.0)
    rows = toy.Rows(batch_size=toy.ROWS)
    train(model, rows, config=TrainConfig(lr=0.1, weight_decay=0, clip_norm=0.5), folder=tmp_path)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.1, weight_decay=0)
    by_hand(next(rows.epoch(0)))["loss"].backward()
    nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
    optimizer.step()
    by_hand.after_step()
    assert equal_weights(model, by_hand)


@pytest.mark.parametrize("stop_at", [1, 7, 10])
def test_interrupted_training_ends_in_the_same_weights(tmp_path: Path, stop_at: int) -> None:
    config = TrainConfig(epochs=3, lr=0.02, checkpoint_every=2, schedule="cosine")
    calm, broken, resumed = toy.toy(), toy.toy(), toy.toy()
    train(calm, toy.Rows(), config=config, folder=tmp_path / "calm")
    with pytest.raises(KeyboardInterrupt):
        train(broken, toy.Rows(stop_at=stop_at), config=config, folder=tmp_path / "broken")
    train(resumed, toy.Rows(), config=config, folder=tmp_path / "broken")
    assert equal_weights(calm, resumed)
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("calm", "broken")]
    assert metrics[0] == metrics[1]


def test_two_processes_killed_and_resumed_end_in_the_same_weights(tmp_path: Path) -> None:
    launch(tmp_path / "calm")
    launch(tmp_path / "killed", kill_at=8)
    launch(tmp_path / "killed")
    for name in ("final.safetensors", "metrics.jsonl"):
        assert (tmp_path / "calm" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_two_processes_with_ragged_batches_train_as_one(tmp_path: Path) -> None:
    launch(tmp_path / "two", dropout=0.0)
    model = toy.toy(0.0)
    config = TrainConfig(epochs=3, lr=0.02, checkpoint_every=2, schedule="cosine")
    train(model, toy.Rows(), config=config, folder=tmp_path / "one")
    two = load_file(str(tmp_path / "two" / "final.safetensors"))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


def test_finished_training_trains_nothing_more(tmp_path: Path) -> None:
    config = TrainConfig(epochs=2, lr=0.02)
    first, second = toy.toy(), toy.toy()
    train(first, toy.Rows(), config=config, folder=tmp_path)
    result = train(second, toy.Rows(kill_at=0), config=config, folder=tmp_path)
    assert equal_weights(first, second)
    assert result.steps == 10 and len(result.history) == 2


def test_other_settings_do_not_resume(tmp_path: Path) -> None:
    train(toy.toy(), toy.Rows(), config=TrainConfig(lr=0.02), folder=tmp_path)
    with pytest.raises(ConflictError, match="another config"):
        train(toy.toy(), toy.Rows(), config=TrainConfig(lr=0.03), folder=tmp_path)


def test_early_stopping_restores_the_best_epoch(tmp_path: Path) -> None:
    scores = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"recall": next(scores)}

    config = TrainConfig(epochs=9, lr=0.02, patience=2)
    model = toy.toy()
    result = train(
        model, toy.Rows(), config=config, folder=tmp_path, evaluate=evaluate, monitor="recall", mode="max"
    )
    assert (result.best, result.best_epoch, result.epochs, result.stopped_early) == (3.0, 1, 4, True)
    assert all(torch.equal(v, seen[1][k]) for k, v in model.state_dict().items())


def test_unknown_monitor_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no metric named 'auc'"):
        train(toy.toy(), toy.Rows(), config=TrainConfig(), folder=tmp_path, monitor="auc")


def test_nan_loss_is_an_error(tmp_path: Path) -> None:
    rows = toy.Rows()
    rows.y[3] = float("nan")
    with pytest.raises(PrerankError, match="not a number"):
        train(toy.toy(), rows, config=TrainConfig(), folder=tmp_path)


def test_out_of_gpu_memory_names_the_knob(tmp_path: Path) -> None:
    class Large(toy.Toy):  # type: ignore[misc,name-defined]
        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(PrerankError, match="at step 0 with batches of 8") as caught:
        train(Large(), toy.Rows(), config=TrainConfig(batch_size=8), folder=tmp_path)
    assert caught.value.hint == "set training.batch_size = 4 in --config"


def test_too_few_batches_is_an_error(tmp_path: Path) -> None:
    class Short(toy.Rows):  # type: ignore[misc,name-defined]
        def __len__(self) -> int:
            return 9

    with pytest.raises(UsageError, match="gave 5 batches, its length says 9"):
        train(toy.toy(), Short(), config=TrainConfig(), folder=tmp_path)


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fp16"):
        train(toy.toy(), toy.Rows(), config=TrainConfig(precision="fp16"), folder=tmp_path)


def test_bf16_trains_close_to_fp32(tmp_path: Path) -> None:
    losses = []
    for precision in ("no", "bf16"):
        config = TrainConfig(epochs=3, lr=0.02, precision=precision)
        result = train(toy.toy(0.0), toy.Rows(), config=config, folder=tmp_path / precision)
        losses.append(result.history[-1]["loss"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_init_from_grows_a_vocabulary(tmp_path: Path) -> None:
    old, new = nn.Embedding(3, 2), nn.Embedding(5, 2)
    fresh = new.weight[3:].clone()
    save_file(old.state_dict(), str(tmp_path / "model.safetensors"))
    report = checkpoints.load_grown(new, tmp_path)
    assert report == {"grown": ["weight"], "fresh": []}
    assert torch.equal(new.weight[:3], old.weight) and torch.equal(new.weight[3:], fresh)


def test_init_from_refuses_a_smaller_or_wider_table(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(5, 2)}, str(tmp_path / "model.safetensors"))
    for model in (nn.Embedding(4, 2), nn.Embedding(6, 3)):
        with pytest.raises(UsageError, match=r"weight has shape \(5, 2\)"):
            checkpoints.load_grown(model, tmp_path)


def test_train_starts_from_an_earlier_model(tmp_path: Path) -> None:
    old = toy.toy()
    save_file(old.state_dict(), str(tmp_path / "model.safetensors"))
    torch.manual_seed(99)
    model = toy.Toy()
    config = TrainConfig(lr=1e-12, weight_decay=0)
    train(model, toy.Rows(), config=config, folder=tmp_path / "run", init_from=tmp_path)
    torch.testing.assert_close(model.body[0].weight, old.body[0].weight)
