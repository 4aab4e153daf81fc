"""The demo: its lines are real command lines; killed at any moment it ends in the bytes of a quiet run."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prerank_cli.main import call
from tests.test_cli import COMMANDS
from tests.toy import tree

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_demo_prints_lines_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["demo", "-o", "run", "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 20
    stages = {" ".join(shlex.split(line)[1:3]) for line in lines}
    for stage in ("data validate", "data split", "data partition", "data requests", "data features"):
        assert stage in stages
    for stage in ("embed items", "quantize sid", "gsu topk", "train user", "embed users", "export vectors"):
        assert stage in stages
    assert {"train scorer", "eval scores"} <= stages and any(
        line.startswith("prerank score ") for line in lines
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_the_readme_names_every_command_as_its_help_does(name: str) -> None:
    first = (COMMANDS[name].help or "").strip().splitlines()[0]
    assert f"| `prerank {name}` | {first} |" in README


def demo(out: Path, *, seconds: float | None = None) -> int:
    """One demo in a process group of its own, killed whole after `seconds`."""
    command = [sys.executable, "-m", "prerank_cli", "demo", "-o", str(out), "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def results(out: Path) -> dict[str, bytes]:
    """Every published byte of a run, manifests without timing and invocation."""
    found = {}
    for name, content in tree(out).items():
        if "/shards/" in name or name.startswith("reports/"):
            continue
        if name.endswith("manifest.json"):
            told = json.loads(content)
            del told["timing"], told["invocation"]
            content = json.dumps(told, sort_keys=True).encode()
        if not name.endswith(".parquet") or "scores_" not in name:
            found[name] = content
    return found


@pytest.mark.slow
def test_killed_again_and_again_it_ends_in_the_bytes_of_a_quiet_run(tmp_path: Path) -> None:
    # The same folder name for both: a manifest of a model may name a column file by its path.
    quiet, killed = tmp_path / "quiet/run", tmp_path / "killed/run"
    assert demo(quiet) == 0
    moments = random.Random(0)
    kills = 0
    while demo(killed, seconds=moments.uniform(3, 30)) != 0:
        kills += 1
        assert kills < 100
    assert kills
    assert results(killed) == results(quiet)
    # The single-file scores carry their manifest in the footer: their rows are compared.
    import polars as pl

    for path in quiet.glob("scores_*.parquet"):
        assert pl.read_parquet(path).equals(pl.read_parquet(killed / path.name))
