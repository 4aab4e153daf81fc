"""TensorBoard: drawn where a folder is named, not loaded otherwise, missed with the line that installs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from prerank_cli.main import call
from prerank_tools.errors import UsageError
from prerank_tools.training.board import check_board, with_board
from prerank_tools.training.loop import TrainConfig, train
from tests.training.test_loop import toy


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every curve."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_every_epoch_is_drawn_and_a_resumed_one_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = TrainConfig(epochs=3, lr=0.02)
    log = with_board(lambda *_, **__: None, tmp_path / "board")
    with pytest.raises(KeyboardInterrupt):
        train(toy.toy(), toy.Rows(stop_at=12), config=config, folder=tmp_path / "run", log=log)
    again = with_board(lambda *_, **__: None, tmp_path / "board")
    result = train(toy.toy(), toy.Rows(), config=config, folder=tmp_path / "run", log=again)
    drawn = scalars(tmp_path / "board")
    assert [step for step, _ in drawn["loss"]] == [5, 10, 15]
    assert [value for _, value in drawn["loss"]] == pytest.approx([h["loss"] for h in result.history])


def test_without_a_folder_nothing_is_loaded_or_wrapped() -> None:
    log = print
    assert with_board(log, None) is log
    check_board(None)
    loads = "import sys; import prerank_tools.training.loop, prerank_tools.users.train_stage\n"
    loads += "assert not {'tensorboard', 'torch.utils.tensorboard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", loads], check=True)


def test_a_missing_tensorboard_is_named_with_its_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="tensorboard is not installed"):
        check_board(tmp_path)
    x = pl.Series([[float(n % 7), float(n % 5), 1.0] for n in range(64)], dtype=pl.Array(pl.Float32, 3))
    pl.DataFrame({"item_id": range(64), "embedding": x}).write_parquet(tmp_path / "emb.parquet")
    line = ["train", "quantizer", str(tmp_path / "emb.parquet"), "-o", str(tmp_path / "codebook")]
    line += ["--tensorboard", str(tmp_path / "board")]
    assert call(line) == 2
    assert "rkmeans has no training to draw" in capsys.readouterr().err
    assert call([*line, "--quantizer", "rqvae"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "hint: pip install 'prerank[tensorboard]'"
    assert not (tmp_path / "codebook").exists() and not (tmp_path / "board").exists()
