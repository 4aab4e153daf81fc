"""Checkpoints: exact round trip, and a damaged one is not used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from prerank_tools.training import checkpoints


def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))
    model(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_round_trip_is_exact(tmp_path: Path) -> None:
    model, optimizer = stepped()
    checkpoints.save(tmp_path, 7, model=model, optimizer=optimizer, state={"epoch": 1})
    found = checkpoints.latest(tmp_path)
    assert found is not None and (found.step, found.state) == (7, {"epoch": 1})
    other = nn.Linear(3, 2)
    fresh = torch.optim.AdamW(other.parameters(), lr=9.0)
    checkpoints.restore(found, model=other, optimizer=fresh)
    assert torch.equal(other.weight, model.weight)
    assert fresh.param_groups[0]["lr"] == 0.1 and tuple(fresh.param_groups[0]["betas"]) == (0.8, 0.9)
    for old, new in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "no record", "half a record", "missing"])
def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    model, optimizer = stepped()
    for step in (1, 2):
        checkpoints.save(tmp_path, step, model=model, optimizer=optimizer, state={})
    newest = tmp_path / "step-000000002"
    tensors, record = newest / "model.safetensors", newest / checkpoints.RECORD
    content = tensors.read_bytes()
    if damage == "truncate":
        tensors.write_bytes(content[:-1])
    elif damage == "flip":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        (newest / "optimizer.safetensors").unlink()
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text()[:-1])
    found = checkpoints.latest(tmp_path)
    assert found is not None and found.step == 1


def test_prune_keeps_the_newest_two_and_the_best(tmp_path: Path) -> None:
    model, optimizer = stepped()
    for step in (1, 2, 3, 4):
        checkpoints.save(tmp_path, step, model=model, optimizer=optimizer, state={})
    checkpoints.prune(tmp_path, protect=[1])
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["1", "3", "4"]


def test_tied_weights_survive(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    model, other = Tied(), Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    found = checkpoints.save(tmp_path, 1, model=model, optimizer=optimizer, state={})
    checkpoints.restore(found, model=other)
    assert torch.equal(other.embed.weight, model.embed.weight)
    assert other.head.weight is other.embed.weight
