"""SCL: the loss by hand, what is masked, where bank keys come from, one process and two."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prerank_tools.encoders.moco import Bank, Scl, SclConfig, bank_size, same_content
from prerank_tools.training.losses import info_nce, triplet

TOY = Path(__file__).with_name("toy_scl.py")


def _load_toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy_scl", TOY)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = _load_toy()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def batch(rows: list[int]) -> dict[str, Any]:
    import numpy as np

    return toy.pairs().make(np.array(rows))


def test_info_nce_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    expected = -math.log(math.exp(1) / (math.exp(2) + math.exp(1) + 1))
    assert info_nce(logits, torch.tensor([1])).item() == pytest.approx(expected)
    masked = torch.tensor([[True, True, False]])  # the positive itself is never masked
    expected = -math.log(math.exp(1) / (math.exp(1) + 1))
    assert info_nce(logits, torch.tensor([1]), masked_BN=masked).item() == pytest.approx(expected)


def test_triplet_by_hand() -> None:
    positive, negative = torch.tensor([0.9, 0.5, 0.5]), torch.tensor([0.1, 0.4, 0.9])
    assert triplet(positive, negative, margin=0.2).item() == pytest.approx((0 + 0.1 + 0.6) / 3)
    valid = torch.tensor([True, True, False])
    assert triplet(positive, negative, margin=0.2, valid_B=valid).item() == pytest.approx(0.1 / 3)


def test_same_item_and_same_group_are_masked_and_no_group_is_no_group() -> None:
    items, groups = torch.tensor([7, 8]), torch.tensor([1, -1])
    keys, key_groups = torch.tensor([7, 9, 10, 11]), torch.tensor([1, 1, -1, 2])
    expected = torch.tensor([[True, True, False, False], [False, False, False, False]])
    assert torch.equal(same_content(items, keys, groups, key_groups), expected)


def test_bank_is_first_in_first_out() -> None:
    bank = Bank(3, 1)
    assert len(bank) == 0 and bank.content()[0].shape == (0, 1)
    bank.enqueue(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 2]), torch.tensor([-1, 5]))
    assert bank.content()[1].tolist() == [1, 2] and bank.content()[2].tolist() == [-1, 5]
    bank.enqueue(torch.tensor([[3.0], [4.0]]), torch.tensor([3, 4]), torch.tensor([-1, -1]))
    assert bank.keys_KD[:, 0].tolist() == [4.0, 2.0, 3.0]
    bank.enqueue(torch.arange(5.0)[:, None], torch.arange(5), torch.arange(5))
    assert sorted(bank.content()[1].tolist()) == [2, 3, 4]


@pytest.mark.parametrize(
    ("knobs", "items", "batch_size", "size"),
    [
        ({}, 1_000, 256, 500),
        ({}, 10_000_000, 256, 196_800),
        ({"bank": 64}, 1_000, 256, 64),
        ({"bank": 0}, 1_000, 256, 0),
        ({"bank": 5_000, "momentum": 0.9}, 1_000, 256, 2_560),
    ],
)
def test_bank_size(knobs: dict[str, Any], items: int, batch_size: int, size: int) -> None:
    found, warning = bank_size(SclConfig(**knobs), items, batch_size)
    assert found == size
    assert bool(warning) == (knobs.get("bank") == 5_000)


def test_loss_by_hand_with_bank_in_batch_and_both_directions() -> None:
    model = toy.scl(bank=8, triplet_weight=0.3, bank_weight=0.25)
    first, second = batch([0, 4, 8]), batch([1, 2, 6])
    model(first)
    model.after_step()
    with torch.no_grad():  # the momentum encoder is another one by now
        model.encoder.project.weight.mul_(1.5).add_(0.1)
    out = model(second)

    query, item = model.encoder(second["query"]), model.encoder(second["item"])
    slow = {side: model.momentum(second[side]) for side in ("query", "item")}
    hard, scale = model.encoder(second["hard"]), model.log_scale.exp()
    items = torch.tensor([0, 1, 3, 0, 2, 4])  # rows // 2 of both batches
    groups = torch.tensor([-1, -1, -1, 0, -1, -1])

    def direction(one: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        logits, n = one @ keys.T * scale, len(keys)
        same = items[:3, None] == items[None, :n]
        same |= (groups[:3, None] == groups[None, :n]) & (groups[:3, None] >= 0)
        own = torch.eye(3, n, dtype=torch.bool)
        return -logits.masked_fill(same & ~own, -math.inf).log_softmax(1).diagonal().mean()

    in_batch = (direction(query, item) + direction(item, query)) / 2
    banked = {side: torch.cat([slow[side], model.momentum(first[side])]) for side in slow}
    against_bank = (direction(query, banked["item"]) + direction(item, banked["query"])) / 2
    positive, negative = (query * item).sum(1), (query * hard).sum(1)
    hinge = (0.2 - positive + negative).clamp(min=0) * torch.tensor([0.0, 0.0, 1.0])
    torch.testing.assert_close(out["nce_bank"], against_bank)
    torch.testing.assert_close(out["nce"], 0.75 * in_batch + 0.25 * against_bank)
    torch.testing.assert_close(out["loss"], out["nce"] + 0.3 * hinge.mean())


def test_logits_stay_fp32_under_autocast() -> None:
    model, one = toy.scl(bank=0, temperature=0.01, learn_temperature=False), batch([9, 13, 16])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(one)["nce"]
        query, item = model.encoder(one["query"]).float(), model.encoder(one["item"]).float()
    logits = query @ item.T * 100
    expected = (info_nce(logits, torch.arange(3)) + info_nce(logits.T, torch.arange(3))) / 2
    torch.testing.assert_close(loss, expected)


def test_without_a_bank_the_loss_is_in_batch_alone() -> None:
    model = toy.scl(bank=0, symmetric=False, triplet_weight=0)
    one = batch([9, 13, 16])
    logits = model.encoder(one["query"]) @ model.encoder(one["item"]).T * model.log_scale.exp()
    out = model(one)
    torch.testing.assert_close(out["loss"], -logits.log_softmax(1).diagonal().mean())
    assert model.momentum is None and "nce_bank" not in out and "triplet" not in out


def test_bank_keys_come_from_the_momentum_encoder_alone_and_carry_no_gradient() -> None:
    model = toy.scl(bank=8, momentum=0.9, momentum_warmup=False, bank_weight=1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    start = model.encoder.project.weight.detach().clone()
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7]):
        one, slow = batch(rows), model.momentum(batch(rows)["item"])
        model(one)["loss"].backward()
        optimizer.step()
        model.after_step()
    keys, items, _ = model.item_bank.content()
    assert torch.equal(keys[4:], slow) and items.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not torch.allclose(keys[4:], model.encoder(one["item"]))
    assert not keys.requires_grad and all(p.grad is None for p in model.momentum.parameters())
    assert not torch.equal(model.momentum.project.weight, start)

    # The momentum encoder is 0.9 of its past and 0.1 of the trained one, once a step.
    before = model.momentum.project.weight.clone()
    model(batch([9, 13]))
    model.after_step()
    expected = 0.9 * before + 0.1 * model.encoder.project.weight
    torch.testing.assert_close(model.momentum.project.weight, expected.detach())

    # With the bank's term alone no gradient reaches the trained encoder through a key.
    key_only = batch([10, 14])
    model.zero_grad()
    model.config = SclConfig(symmetric=False)
    model(key_only)["nce_bank"].backward()
    by_query = model.encoder.project.weight.grad.clone()
    model.zero_grad()
    query = model.encoder(key_only["query"])
    stopped = torch.cat([model.momentum(key_only["item"]), model.item_bank.content()[0]]).detach()
    same = same_content(
        key_only["item_id"],
        torch.cat([key_only["item_id"], model.item_bank.content()[1]]),
        key_only["group"],
        torch.cat([key_only["group"], model.item_bank.content()[2]]),
    )
    logits = query @ stopped.T * model.log_scale.exp()
    info_nce(logits, torch.arange(2), masked_BN=same).backward()
    torch.testing.assert_close(by_query, model.encoder.project.weight.grad)


def test_momentum_warms_up() -> None:
    model = toy.scl(bank=8)
    rates = []
    for _ in range(3):
        before = model.momentum.project.weight.clone()
        with torch.no_grad():
            model.encoder.project.weight.copy_(before + 1)
        model(batch([0, 1]))
        model.after_step()
        rates.append(1 - (model.momentum.project.weight - before).mean().item())
    assert rates == pytest.approx([1 / 10, 2 / 11, 3 / 12], abs=1e-5)


def test_temperature_is_clamped() -> None:
    model = toy.scl()
    for raw, clamped in ((9.0, math.log(100)), (-1.0, 0.0)):
        with torch.no_grad():
            model.log_scale.fill_(raw)
        model.after_step()
        assert model.log_scale.item() == pytest.approx(clamped)
    assert not toy.scl(learn_temperature=False).log_scale.requires_grad


def test_batch_norm_keeps_its_running_statistics() -> None:
    encoder = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    Scl(encoder, dim=2, bank=0).train()
    assert [module.training for module in encoder] == [True, False, True]


def launch(folder: Path, kill_at: int = -1) -> None:
    folder.mkdir(exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*torchrun, str(TOY), str(folder), str(kill_at)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode == 0) == (kill_at < 0), done.stderr[-4000:]


def test_two_processes_with_ragged_batches_train_as_one(tmp_path: Path) -> None:
    toy.main(tmp_path)
    launch(tmp_path / "two")
    one = load_file(str(tmp_path / "final.safetensors"))
    two = load_file(str(tmp_path / "two" / "final.safetensors"))
    order_one, order_two = (x["item_bank.keys_KD"].sum(1).sort() for x in (one, two))
    torch.testing.assert_close(order_one.values, order_two.values, rtol=1e-3, atol=1e-4)
    for name in (
        "encoder.project.weight",
        "momentum.project.weight",
        "log_scale",
        "neighbours.log_scale",
        "item_bank.filled",
    ):
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_killed_processes_resume_with_the_same_bank(tmp_path: Path) -> None:
    launch(tmp_path / "calm")
    launch(tmp_path / "killed", kill_at=5)
    launch(tmp_path / "killed")
    final = "final.safetensors"
    assert (tmp_path / "calm" / final).read_bytes() == (tmp_path / "killed" / final).read_bytes()


def test_interrupted_training_resumes_with_the_same_bank(tmp_path: Path) -> None:
    from prerank_tools.training.loop import TrainConfig, train

    class StopError(Exception):
        pass

    def stopping() -> Any:
        batches, calls = toy.pairs(), iter(range(99))
        make = batches.make

        def stop(rows: Any) -> Any:
            if next(calls) == 4:
                raise StopError
            return make(rows)

        return type(batches)(batches.rows, stop, batches.batch_size)

    config = TrainConfig(epochs=3, batch_size=8, lr=0.02, checkpoint_every=2)
    calm, broken, resumed = toy.scl(), toy.scl(), toy.scl()
    train(calm, toy.pairs(), config=config, folder=tmp_path / "calm")
    with pytest.raises(StopError):
        train(broken, stopping(), config=config, folder=tmp_path / "broken")
    train(resumed, toy.pairs(), config=config, folder=tmp_path / "broken")
    for name, tensor in calm.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
