"""What cannot be fitted is told before anything is: one error, one hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from prerank_cli.main import call
from prerank_tools.errors import ContractError
from prerank_tools.quantizers.stage import QuantizeSids
from prerank_tools.run.job import RunOptions, run
from prerank_tools.tables.vectors import numpy_to_vectors


def write(path: Path, rows: int) -> Path:
    x_ND = np.random.default_rng(0).standard_normal((rows, 12)).astype(np.float32)
    pl.DataFrame({"item_id": range(rows)}).with_columns(numpy_to_vectors("embedding", x_ND)).write_parquet(
        path
    )
    return path


@pytest.mark.parametrize(
    ("codes", "levels", "told"),
    [
        (0, 3, "`codes`: one number from 1 to 65536"),
        ("[8, 0]", 2, "one number from 1 to 65536"),
        (70_000, 3, "one number from 1 to 65536"),
        (64, 12, "need more than 63 bits"),
    ],
)
@pytest.mark.parametrize("command", ["quantize sid", "train quantizer"])
def test_impossible_sizes_are_one_error_and_one_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], codes: Any, levels: int, told: str, command: str
) -> None:
    emb, config = write(tmp_path / "emb.parquet", 80), tmp_path / "config.toml"
    config.write_text(f"[{command.replace(' ', '.')}]\ncodes = {codes}\nlevels = {levels}\n")
    line = [*command.split(), str(emb), "--config", str(config), "-o", str(tmp_path / "out")]
    assert call(line) in (2, 3)
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert told in error and error.startswith("error: ") and hint.startswith("hint: ")


def test_a_single_vector_is_no_codebook(tmp_path: Path) -> None:
    stage = QuantizeSids(write(tmp_path / "emb.parquet", 1))
    with pytest.raises(ContractError, match="1 vector to fit"):
        run(stage, tmp_path / "sid", RunOptions(workers=1, threads=1))
