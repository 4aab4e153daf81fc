"""The command line: help, flags, exit codes, configuration, what lands on stdout and stderr."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer

from prerank_cli.main import app, call
from prerank_cli.options import EXAMPLES
from tests.toy import write_items

COMMON = {
    "output", "overwrite", "compare_to", "gate", "max_bad", "workers", "threads", "device", "engine",
    "dry_run", "json", "config",
}  # fmt: skip
HEAVY = ("torch", "faiss", "transformers", "sklearn", "polars", "numba", "numpy")


def commands() -> Iterator[tuple[str, Any]]:
    """Every command by its full name, with its click object."""
    todo: list[tuple[str, Any]] = [("", typer.main.get_command(app))]
    while todo:
        name, command = todo.pop()
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name.strip(), command
        else:
            todo += [(f"{name} {word}", sub) for word, sub in inner.items()]


COMMANDS = dict(sorted(commands()))


def test_help_answers_at_once_and_loads_nothing_heavy() -> None:
    script = (
        "import sys, time\n"
        "started = time.perf_counter()\n"
        "from prerank_cli.main import call\n"
        "code = call(['--help'])\n"
        "seconds = time.perf_counter() - started\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "print(f'{code} {seconds:.3f} {heavy}', file=sys.stderr)\n"
    )
    seconds = []
    for _ in range(3):
        told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        code, took, heavy = told.stderr.split(maxsplit=2)
        assert (code, heavy.strip()) == ("0", "[]")
        seconds.append(float(took))
    assert min(seconds) < 0.7


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_opens_with_one_imperative_line_and_two_examples(name: str) -> None:
    command = COMMANDS[name]
    first = (command.help or "").strip().splitlines()[0]
    assert first and first[0].isupper() and first.endswith("."), first
    assert len(EXAMPLES[name]) >= 2, f"{name} has {len(EXAMPLES[name])} examples"
    for line in EXAMPLES[name]:
        assert line.startswith(f"prerank {name}"), line


def test_the_flags_are_those_that_were_promised(request: pytest.FixtureRequest) -> None:
    promised = json.loads((Path(__file__).parent / "flags.json").read_text())
    found = {
        name: sorted({parameter.name for parameter in command.params if parameter.name != "help"})
        for name, command in COMMANDS.items()
    }
    assert found == promised, "a flag is a promise: change tests/flags.json and the CHANGELOG with it"


def test_no_arguments_print_help_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call([]) == 2
    assert call(["embed"]) == 2
    assert "Usage" in "".join(capsys.readouterr())


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--version"]) == 0
    assert capsys.readouterr().out.startswith("prerank 0.")


def test_an_unknown_flag_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["inspect", "--frobnicate", "."]) == 2


def test_errors_are_one_line_and_one_hint_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["inspect", str(tmp_path / "nothing")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error, hint = captured.err.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: ")


def embed(items: Path, out: Path, *more: str) -> int:
    return call(["embed", "items", str(items), "-o", str(out), "--workers", "1", *more])


def test_json_is_the_only_thing_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = write_items(tmp_path / "items.parquet")
    assert embed(items, tmp_path / "emb", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["status"], told["rows"], told["stage"]) == ("done", 10, "embed.items")
    assert embed(items, tmp_path / "emb", "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "up to date"


def test_other_work_exits_4_and_overwrite_replaces_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(write_items(tmp_path / "a.parquet", 10), tmp_path / "emb") == 0
    other = write_items(tmp_path / "b.parquet", 12)
    assert embed(other, tmp_path / "emb") == 4
    assert "--overwrite" in capsys.readouterr().err
    assert embed(other, tmp_path / "emb", "--overwrite") == 0


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = write_items(tmp_path / "items.parquet")
    assert embed(items, tmp_path / "emb", "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["status"], told["shards"], told["rows_in"]) == ("planned", 1, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.parquet"]


def test_flag_beats_environment_beats_config_beats_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = write_items(tmp_path / "items.parquet")
    config = tmp_path / "nightly.toml"
    config.write_text("[embed.items]\nthreads = 3\n")

    def threads(name: str, *more: str) -> int:
        assert embed(items, tmp_path / name, *more) == 0
        return int(json.loads((tmp_path / name / "manifest.json").read_text())["environment"]["threads"])

    assert threads("default") == 2
    assert threads("config", "--config", str(config)) == 3
    monkeypatch.setenv("PRERANK_EMBED_ITEMS_THREADS", "1")
    assert threads("environment", "--config", str(config)) == 1
    assert threads("flag", "--config", str(config), "--threads", "2") == 2


def test_an_unknown_key_or_a_broken_config_is_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = write_items(tmp_path / "items.parquet")
    config = tmp_path / "nightly.toml"
    config.write_text("[embed.items]\nfrobnicate = 3\n")
    assert embed(items, tmp_path / "emb", "--config", str(config)) == 2
    assert "frobnicate" in capsys.readouterr().err
    config.write_text("[embed.items\n")
    assert embed(items, tmp_path / "emb", "--config", str(config)) == 2
    assert "not TOML" in capsys.readouterr().err


def test_cuda_without_a_gpu_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert embed(write_items(tmp_path / "items.parquet"), tmp_path / "emb", "--device", "cuda") == 2
    assert "no GPU" in capsys.readouterr().err


def test_off_a_terminal_progress_is_plain_utc_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(write_items(tmp_path / "items.parquet"), tmp_path / "emb") == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(" INFO embed.items shard done=1/1 rows=10 " in line for line in lines)
    assert all(time.strptime(line.split()[0], "%Y-%m-%dT%H:%M:%SZ") for line in lines)


def test_outputs_open_in_other_tools_as_they_stand(tmp_path: Path) -> None:
    duckdb, pandas, parquet = (pytest.importorskip(n) for n in ("duckdb", "pandas", "pyarrow.parquet"))
    assert embed(write_items(tmp_path / "items.parquet"), tmp_path / "emb") == 0
    pattern = str(tmp_path / "emb/data/part-*.parquet")
    assert len(pl.read_parquet(pattern)) == 10
    assert duckdb.connect().execute(f"select count(*) from '{pattern}'").fetchone() == (10,)
    assert len(pandas.read_parquet(tmp_path / "emb/data")) == 10
    assert parquet.read_table(tmp_path / "emb/data").num_rows == 10
