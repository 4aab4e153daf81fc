"""SID interchange: every format holds what its project expects, and comes back as it went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.export.sid import ExportSid
from prerank_tools.export.sid_formats import SidFormat, read_sids, write_sids
from prerank_tools.stage import Context
from prerank_tools.tables.parquet import write_parquet
from prerank_tools.tables.table import open_table
from prerank_tools.tables.vectors import numpy_to_vectors

CODES = np.array([[3, 0], [1, 2], [3, 0], [0, 1]])
SIZES = (4, 3)


def parts(ids: list[int] | list[str]):  # type: ignore[no-untyped-def]
    yield pl.Series("item_id", ids[:3]), CODES[:3]
    yield pl.Series("item_id", ids[3:]), CODES[3:]


@pytest.mark.parametrize("ids", [[10, 11, 12, 13], ["x", "y", "10", "é"]])
@pytest.mark.parametrize("format", get_args(SidFormat))
def test_what_is_written_is_read_back(tmp_path: Path, format: SidFormat, ids: list[int] | list[str]) -> None:
    told = write_sids(format, parts(ids), tmp_path, sizes=SIZES)
    assert told == {"format": format, "items": 4, "levels": 2, "sizes": [4, 3]}
    found_ids, found_codes = read_sids(tmp_path)
    back = dict(zip(found_ids.to_list(), found_codes.tolist(), strict=True))
    assert back == dict(zip(ids, CODES.tolist(), strict=True))


def test_lcrec_index(tmp_path: Path) -> None:
    write_sids("lcrec", parts([10, 11, 12, 13]), tmp_path, sizes=SIZES)
    assert json.loads((tmp_path / "index.json").read_text()) == {
        "10": ["<a_3>", "<b_0>"],
        "11": ["<a_1>", "<b_2>"],
        "12": ["<a_3>", "<b_0>"],
        "13": ["<a_0>", "<b_1>"],
    }


def test_grid_tensor_is_levels_by_items_with_an_id_map(tmp_path: Path) -> None:
    write_sids("grid", parts(["d", "c", "b", "a"]), tmp_path, sizes=SIZES)
    sids = load_file(tmp_path / "sids.safetensors")["sids"]
    assert sids.dtype == np.int64
    np.testing.assert_array_equal(sids, CODES.T)
    assert pl.read_parquet(tmp_path / "id_map.parquet").rows() == [(0, "d"), (1, "c"), (2, "b"), (3, "a")]


def test_tzrec_map_and_groups(tmp_path: Path) -> None:
    write_sids("tzrec", parts([10, 11, 12, 13]), tmp_path, sizes=SIZES)
    assert pl.read_parquet(tmp_path / "map.parquet").rows() == [
        (10, [3, 0], [3, 0], 1),
        (11, [1, 2], [1, 2], 1),
        (12, [3, 0], [3, 0], 2),
        (13, [0, 1], [0, 1], 1),
    ]
    groups = pl.read_parquet(tmp_path / "groups.parquet")
    assert groups.schema == {"codebook": pl.List(pl.Int64), "itemids": pl.List(pl.Int64)}
    assert groups.rows() == [([0, 1], [13]), ([1, 2], [11]), ([3, 0], [10, 12])]


def test_openonerec_codes(tmp_path: Path) -> None:
    write_sids("openonerec", parts([10, 11, 12, 13]), tmp_path, sizes=SIZES)
    frame = pl.read_parquet(tmp_path / "codes.parquet")
    assert frame.schema == {"pid": pl.Int64, "codes": pl.List(pl.Int64)}
    assert frame.row(1) == (11, [1, 2])


def test_tokens_and_the_words_to_add(tmp_path: Path) -> None:
    write_sids("tokens", parts([10, 11, 12, 13]), tmp_path, sizes=SIZES)
    assert json.loads((tmp_path / "items.jsonl").read_text().splitlines()[1]) == {
        "item_id": 11,
        "sid": "<a_1><b_2>",
    }
    added = json.loads((tmp_path / "added_tokens.json").read_text())
    assert added == ["<a_0>", "<a_1>", "<a_2>", "<a_3>", "<b_0>", "<b_1>", "<b_2>"]


def test_lookup_lists_the_items_of_a_sid(tmp_path: Path) -> None:
    write_sids("lookup", parts([10, 11, 12, 13]), tmp_path, sizes=SIZES)
    frame = pl.read_parquet(tmp_path / "lookup.parquet")
    assert frame["sid"].to_list() == ["<a_0><b_1>", "<a_1><b_2>", "<a_3><b_0>"]
    assert frame["item_ids"].to_list() == [[13], [11], [10, 12]]


def test_foreign_tokens_that_count_from_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"0": ["<a_1>", "<b_256>"], "1": ["<a_2>", "<b_1>"]}')
    ids, codes = read_sids(tmp_path / "index.json")
    assert ids.to_list() == [0, 1] and codes.tolist() == [[1, 256], [2, 1]]


@pytest.mark.parametrize("text", ["[1]", "not json", '{"0": ["<a_1>"], "1": ["<a_1>", "<b_2>"]}'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ContractError, match=r"index\.json: not SIDs"):
        read_sids(tmp_path)


def test_an_unknown_format_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown SID format"):
        write_sids("csv", parts([1, 2, 3, 4]), tmp_path, sizes=SIZES)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="no known SID file"):
        read_sids(tmp_path)


def test_the_stage_makes_a_suffix_one_level_more(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        [
            pl.Series("item_id", [1, 2, 3]),
            numpy_to_vectors("codes", np.array([[3, 0], [3, 0], [1, 2]], np.uint16)),
            pl.Series("sid", ["<a_3><b_0>", "<a_3><b_0>", "<a_1><b_2>"]),
            pl.Series("suffix", [0, 1, 0]),
        ]
    )
    write_parquet(frame, tmp_path / "sids.parquet", contract="item_sids")
    stage = ExportSid(tmp_path / "sids.parquet", format="lcrec")
    ctx = Context(work=tmp_path / "out", inputs={"sids": open_table(tmp_path / "sids.parquet", "item_sids")})
    assert stage.build(ctx)["sizes"] == [4, 3, 2]
    assert json.loads((tmp_path / "out/index.json").read_text())["2"] == ["<a_3>", "<b_0>", "<c_1>"]
