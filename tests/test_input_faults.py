"""Bad input at every command: faults of the table, of a row, and life; one error, one hint, no output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from prerank_cli.main import call
from prerank_tools.tables.vectors import numpy_to_vectors

DAY = 86_400
Frames = dict[str, pl.DataFrame]


def frames() -> Frames:
    """A small world: 40 items, 12 users, a log, requests, vectors."""
    rng = np.random.default_rng(0)
    items = [f"i{n:02d}" for n in range(40)]
    users = [f"u{n:02d}" for n in range(12)]
    rows = [(user, items[int(rng.integers(40))], DAY * day) for user in users for day in range(1, 9)]
    x_ND = rng.normal(size=(40, 8)).astype(np.float32)
    embeddings = pl.DataFrame({"item_id": items}).with_columns(
        numpy_to_vectors("embedding", x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True))
    )
    requests = pl.DataFrame(
        {
            "request_id": [f"r{n}" for n in range(12)],
            "user_id": users,
            "timestamp": [DAY * 10] * 12,
            "candidates": [items[:5]] * 12,
        }
    )
    return {
        "items": pl.DataFrame({"item_id": items, "title": [f"thing number {n}" for n in range(40)]}),
        "events": pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"),
        "embeddings": embeddings,
        "requests": requests,
    }


LINES = {
    "items": "embed items {items} -o {out}",
    "embeddings": "quantize sid {embeddings} -o {out}",
    "requests": "gsu topk --requests {requests} --events {events} --embeddings {embeddings} -o {out}",
    "events": "gsu topk --requests {requests} --events {events} --embeddings {embeddings} -o {out}",
    "partition": "data partition {events} -o {out}",
    "split": "data split {events} --at 432000 -o {out}",
    "export": "export vectors {embeddings} -o {out}",
    "user": "train user --events {events} --embeddings {embeddings} -o {out}",
}
READS = {"partition": "events", "split": "events", "export": "embeddings", "user": "events"}


def run(line: str, folder: Path, tables: Frames, *more: str) -> int:
    """Write the tables and run one line on them."""
    paths = {}
    for name, frame in tables.items():
        paths[name] = folder / f"{name}.parquet"
        if not paths[name].exists():
            frame.write_parquet(paths[name])
    return call([*LINES[line].format(out=folder / "out", **paths).split(), "--workers", "1", *more])


def refused(folder: Path, capsys: pytest.CaptureFixture[str], code: int, wanted: int = 3) -> str:
    """The error line of a refusal, after checking everything else a refusal owes."""
    lines = [line for line in capsys.readouterr().err.splitlines() if " INFO " not in line]
    assert code == wanted, lines
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: "), lines
    assert not (folder / "out").exists()
    return lines[0]


@pytest.mark.parametrize("line", LINES)
def test_the_world_as_it_is_is_accepted(line: str, tmp_path: Path) -> None:
    assert run(line, tmp_path, frames()) == 0


def damaged(name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Frames:
    """The world with one table changed."""
    tables = frames()
    tables[name] = change(tables[name])
    return tables


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("fault", ["text", "cut", "empty", "column"])
def test_a_fault_of_the_table_exits_3_and_names_it(
    line: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = READS.get(line, line)
    path = tmp_path / f"{name}.parquet"
    tables = frames()
    if fault == "text":
        path.write_text("item_id,title\n")
    elif fault == "cut":
        tables[name].write_parquet(path)
        path.write_bytes(path.read_bytes()[:-7])
    elif fault == "empty":
        tables = damaged(name, lambda frame: frame.clear())
    else:
        tables = damaged(
            name, lambda frame: frame.drop(frame.columns[1 if name in ("events", "requests") else 0])
        )
    told = refused(tmp_path, capsys, run(line, tmp_path, tables))
    assert str(path) in told
    if fault == "column":
        assert "column `" in told


@pytest.mark.parametrize(
    ("line", "name", "change", "told"),
    [
        ("items", "items", lambda f: f.with_columns(item_id=pl.lit("same")), "'same' comes more than once"),
        (
            "embeddings",
            "embeddings",
            lambda f: f.with_columns(embedding=pl.lit(1.5)),
            "`embedding` is Float64",
        ),
        ("embeddings", "embeddings", lambda f: pl.concat([f, f.head(1)]), "'i00' comes more than once"),
        ("events", "events", lambda f: f.with_columns(pl.col("timestamp") * 10**9), "`timestamp` reaches"),
        ("events", "events", lambda f: f.with_columns(timestamp=pl.lit("today")), "`timestamp` is String"),
        (
            "requests",
            "requests",
            lambda f: f.with_columns(candidates=pl.lit("i00")),
            "`candidates` is String",
        ),
        ("events", "events", lambda f: f.with_columns(item_id=pl.lit(7)), "item_id"),
    ],
)
def test_wrong_types_keys_and_times_are_faults_of_the_table(
    line: str,
    name: str,
    change: Callable[[pl.DataFrame], pl.DataFrame],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert told in refused(tmp_path, capsys, run(line, tmp_path, damaged(name, change)))


def without_vector(value: list[float] | None) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """The first item's vector replaced."""

    def change(frame: pl.DataFrame) -> pl.DataFrame:
        rows = frame["embedding"].to_list()
        return frame.with_columns(pl.Series("embedding", [value, *rows[1:]], dtype=frame["embedding"].dtype))

    return change


@pytest.mark.parametrize("line", ["embeddings", "export"])
@pytest.mark.parametrize("vector", [None, [float("nan")] * 8, [0.0] * 8], ids=["null", "NaN", "zero"])
def test_a_fault_of_a_row_is_quarantined_with_its_reason(
    line: str, vector: list[float] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = damaged("embeddings", without_vector(vector))
    told = refused(tmp_path, capsys, run(line, tmp_path, tables))
    assert "1 of 40 rows are unusable" in told
    assert run(line, tmp_path, tables, "--max-bad", "0.05") == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["counts"]["quarantined"] == 1
    assert manifest["outputs"]["rows"] == 39
    bad = pl.read_parquet(tmp_path / "out/quarantine/part-*.parquet")
    assert bad["item_id"].to_list() == ["i00"] and "vector" in bad["reason"][0]


def test_an_item_without_text_or_image_is_a_fault_of_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = pl.col("item_id") == "i00"
    tables = damaged(
        "items", lambda f: f.with_columns(title=pl.when(first).then(None).otherwise(pl.col("title")))
    )
    assert "1 of 40 rows" in refused(tmp_path, capsys, run("items", tmp_path, tables))
    assert run("items", tmp_path, tables, "--max-bad", "0.05") == 0
    assert pl.read_parquet(tmp_path / "out/quarantine/part-*.parquet")["item_id"].to_list() == ["i00"]


def test_a_cold_user_and_a_candidate_without_a_vector_are_life(tmp_path: Path) -> None:
    tables = frames()
    unknown = pl.Series("candidates", [["i00", "unknown"]] + [["i01"]] * 11)
    tables["requests"] = tables["requests"].with_columns(
        unknown, user_id=pl.Series(["stranger", *tables["requests"]["user_id"][1:]])
    )
    assert run("requests", tmp_path, tables) == 0
    rows = pl.read_parquet(tmp_path / "out/data/part-*.parquet")
    assert len(rows) == 13
    stranger = rows.filter(pl.col("request_id") == "r0")
    assert stranger["simtier"].to_list() == [[0] * 22] * 2
    assert json.loads((tmp_path / "out/manifest.json").read_text())["counts"]["quarantined"] == 0


def test_life_is_refused_where_it_was_asked_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = frames()
    tables["requests"] = tables["requests"].with_columns(candidates=pl.Series([["unknown"]] * 12))
    refused(tmp_path, capsys, run("requests", tmp_path, tables, "--missing", "fail"))


def test_a_missing_file_is_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = call(["embed", "items", str(tmp_path / "none.parquet"), "-o", str(tmp_path / "out")])
    assert "no such file" in refused(tmp_path, capsys, code, wanted=2)


def test_an_object_store_is_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = call(["embed", "items", "s3://bucket/items", "-o", str(tmp_path / "out")])
    assert "only local" in refused(tmp_path, capsys, code, wanted=2)


def test_vectors_of_another_encoder_are_refused_downstream(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = frames()
    for name, items in (("one", tables["items"]), ("other", tables["items"].head(30))):
        items.write_parquet(tmp_path / f"{name}.parquet")
        assert call(["embed", "items", str(tmp_path / f"{name}.parquet"), "-o", str(tmp_path / name)]) == 0
    assert call(["quantize", "sid", str(tmp_path / "one"), "-o", str(tmp_path / "sid")]) == 0
    capsys.readouterr()
    codebook = ["--codebook", str(tmp_path / "sid/codebook")]
    code = call(["quantize", "sid", str(tmp_path / "other"), *codebook, "-o", str(tmp_path / "out")])
    refused(tmp_path, capsys, code)
