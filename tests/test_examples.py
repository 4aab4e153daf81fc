"""Every example in the help, the README's chain and the scripts in examples/ run as they stand."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from prerank_cli.main import call
from prerank_cli.options import EXAMPLES
from prerank_sample_data import sample

ROOT = Path(__file__).parent.parent
HELD_OUT = 1_318_291_200  # 2011-10-11
# Makers before users of what they make; the demo has a test of its own.
ORDER = (
    "data validate", "data describe", "data partition", "data split", "data requests", "data pairs",
    "data features",
    "embed items", "eval embeddings", "train quantizer", "quantize sid", "eval sid", "export sid",
    "gsu topk", "eval gsu", "train user", "embed users", "eval users", "export vectors",
    "train encoder", "train scorer", "score", "eval scores", "inspect",
)  # fmt: skip
# Small enough to train in seconds; what an example shows is its line, not its size.
SMALL = """
[train.user]
training = { epochs = 1 }
[train.scorer]
training = { epochs = 1 }
[train.encoder]
training = { epochs = 1 }
"""


def picture(number: int) -> bytes:
    """A small picture of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (number * 37 % 256, number * 91 % 256, 120)).save(stream, "JPEG")
    return stream.getvalue()


def write_inputs(folder: Path, users: int) -> None:
    """The files that the examples name, cut from the sample."""
    events = pl.read_parquet(sample("retail_events"))
    events = events.filter(pl.col("user_id").is_in(events["user_id"].unique().sort()[:users].implode()))
    items = pl.read_parquet(sample("retail_items")).join(
        events.select("item_id").unique(), on="item_id", how="semi"
    )
    items = items.sort("item_id").with_columns(
        category=pl.col("title").str.split(" ").list.last(),
        image=pl.Series([picture(n) for n in range(len(items))]),
    )
    items.write_parquet(folder / "items.parquet")
    items.head(60).write_parquet(folder / "grocery_items.parquet")
    last_day = events["timestamp"].max() // 86_400 * 86_400  # type: ignore[operator]
    events.filter(pl.col("timestamp") >= last_day).write_parquet(folder / "day2.parquet")
    events = events.filter(pl.col("timestamp") < last_day)
    events.write_parquet(folder / "events.parquet")
    events.write_parquet(folder / "e.parquet")
    (folder / "events").mkdir()
    events.write_parquet(folder / "events/part-0.parquet")
    (folder / "small.toml").write_text(SMALL)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    write_inputs(folder, users=60)
    asked = ["data", "requests", str(folder / "events.parquet"), "--from", str(HELD_OUT)]
    assert call([*asked, "-o", str(folder / "requests_held_out")]) == 0
    held_out = pl.read_parquet(folder / "requests_held_out/data/part-*.parquet")
    held_out.write_parquet(folder / "r.parquet")
    return folder


def test_every_command_has_its_place_in_the_chain() -> None:
    assert set(ORDER) == set(EXAMPLES) - {"demo"}


@pytest.mark.parametrize("name", ORDER)
def test_the_examples_of_the_help_run_as_they_stand(
    name: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    for line in EXAMPLES[name]:
        words = shlex.split(line)[1:]
        more = ["--config", "small.toml"] if words[0] == "train" and words[1] != "quantizer" else []
        code = call([*words, *more])
        assert code == 0, f"{line}\n{capsys.readouterr().err}"


def shell(script: str | Path, folder: Path, *arguments: str, **environment: str) -> str:
    """Run a bash script with the `prerank` of this environment on its path; returns what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", str(script), *arguments] if isinstance(script, Path) else ["bash", "-euc", script]
    told = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    return told.stdout


def test_the_chain_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    write_inputs(tmp_path, users=40)
    readme = (ROOT / "README.md").read_text()
    chain = re.search(r"## The chain\n.*?```bash\n(.*?)```", readme, re.DOTALL)
    assert chain
    shell(chain.group(1), tmp_path)
    scores = pl.read_parquet(tmp_path / "scores.parquet")
    assert scores.columns[:4] == ["request_id", "item_id", "rank", "score"]
    assert scores.filter(pl.col("rank") == 1)["request_id"].is_unique().all()


def test_two_nights_and_a_day_after(tmp_path: Path) -> None:
    """nightly.sh twice, then day2.sh: the link moves, SIDs stay, unchanged items and users are not redone."""
    write_inputs(tmp_path, users=40)
    asked = ["data", "requests", str(tmp_path / "events.parquet"), "--from", str(HELD_OUT)]
    assert call([*asked, "-o", str(tmp_path / "requests")]) == 0
    nightly, root = ROOT / "examples/nightly.sh", tmp_path / "nights"
    times = {"TRAIN_UNTIL": "2011-09-01", "SCORE_UNTIL": "2011-10-11", "KEEP": "2"}
    words = ("items.parquet", "events.parquet", "requests", str(root))
    shell(nightly, tmp_path, *words, "2011-12-08", **times)
    assert (root / "current").readlink() == Path("2011-12-08")

    items = pl.read_parquet(tmp_path / "items.parquet")
    fresh = items.head(2).with_columns(
        item_id=pl.Series(["NEW1", "NEW2"]), title=pl.Series(["red mug", "blue cup"])
    )
    pl.concat([items[1:], fresh]).write_parquet(tmp_path / "items.parquet")
    shell(nightly, tmp_path, *words, "2011-12-09", **times)
    assert (root / "current").readlink() == Path("2011-12-09")
    first, second = (
        pl.read_parquet(root / night / "sid/data/part-*.parquet").select("item_id", "sid")
        for night in ("2011-12-08", "2011-12-09")
    )
    both = first.join(second, on="item_id", suffix="_next")
    assert len(both) == len(first) - 1
    assert (both["sid"] == both["sid_next"]).all()
    assert set(second["item_id"]) - set(first["item_id"]) == {"NEW1", "NEW2"}

    day2 = ROOT / "examples/day2.sh"
    shell(
        day2, tmp_path, "items.parquet", "day2.parquet", str(root / "current"), str(root / "2011-12-10"),
        AS_OF="2011-12-10",
    )  # fmt: skip
    log = pl.read_parquet(root / "2011-12-10/events/data/part-*.parquet")
    day = pl.read_parquet(tmp_path / "day2.parquet")
    assert len(log) == len(pl.read_parquet(tmp_path / "events.parquet")) + len(day)
