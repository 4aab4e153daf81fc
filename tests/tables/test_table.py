"""Opening tables: what is accepted as it stands, what is refused and in which words."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from prerank_tools.errors import ContractError, UsageError
from prerank_tools.tables.contracts import split_rows
from prerank_tools.tables.table import open_table, read_shard, shards_of
from prerank_tools.tables.vectors import faulty_vectors, numpy_to_vectors, vectors_to_numpy


def save(path: Path, frame: pl.DataFrame) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path)
    return path


def events(**changes: object) -> pl.DataFrame:
    columns = {"user_id": [1, 2], "item_id": ["a", "b"], "timestamp": [1_700_000_000, 1_700_000_060]}
    return pl.DataFrame({**columns, **changes})


def test_times_come_out_as_epoch_seconds_whatever_they_were(tmp_path: Path) -> None:
    when = [datetime(2023, 11, 14, 22, 13, 20), datetime(2023, 11, 14, 22, 14, 20)]
    for unit in ("ms", "us", "ns"):
        path = save(
            tmp_path / f"{unit}.parquet",
            events(timestamp=pl.Series(when, dtype=pl.Datetime(unit))),  # type: ignore[arg-type]
        )
        assert open_table(path, "events").read()["timestamp"].to_list() == [1_700_000_000, 1_700_000_060]


def test_milliseconds_in_an_epoch_column_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "e.parquet", events(timestamp=[1_700_000_000_000] * 2))
    with pytest.raises(ContractError, match="`timestamp` reaches 1700000000000") as fault:
        open_table(path, "events")
    assert "// 1000" in fault.value.hint


def test_small_integers_and_categories_are_ids(tmp_path: Path) -> None:
    frame = events(user_id=pl.Series([1, 2], dtype=pl.Int32)).with_columns(
        pl.col("item_id").cast(pl.Categorical)
    )
    read = open_table(save(tmp_path / "e.parquet", frame), "events").read()
    assert read.schema["user_id"] == pl.Int64
    assert read.schema["item_id"] == pl.String


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        (events().drop("item_id"), "column `item_id` .* is missing; it has user_id, timestamp"),
        (events(user_id=[1.5, 2.5]), "column `user_id` is Float64, expected int64 or string"),
        (events().clear(), "empty"),
    ],
)
def test_a_fault_of_the_table_names_file_and_column(tmp_path: Path, frame: pl.DataFrame, told: str) -> None:
    path = save(tmp_path / "e.parquet", frame)
    with pytest.raises(ContractError, match=told) as fault:
        open_table(path, "events")
    assert str(path) in fault.value.message and fault.value.hint


def test_a_repeated_key_names_the_id_and_the_row(tmp_path: Path) -> None:
    path = save(tmp_path / "i.parquet", pl.DataFrame({"item_id": ["a", "b", "a"]}))
    with pytest.raises(ContractError, match=r"item_id 'a' comes more than once \(row 0\)"):
        open_table(path, "items")


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "items.parquet"
    text.write_text("item_id,title\n1,shoe\n")
    with pytest.raises(ContractError, match="not a Parquet file"):
        open_table(text, "items")
    cut = save(tmp_path / "cut.parquet", pl.DataFrame({"item_id": [1]}))
    cut.write_bytes(cut.read_bytes()[:-5])
    with pytest.raises(ContractError, match="cut short"):
        open_table(cut, "items")
    with pytest.raises(UsageError, match="no such file"):
        open_table(tmp_path / "none.parquet", "items")
    with pytest.raises(UsageError, match="only local"):
        open_table(Path("s3://bucket/items"), "items")


def test_a_folder_of_parts_is_one_table_and_parts_must_agree(tmp_path: Path) -> None:
    save(tmp_path / "items/a.parquet", pl.DataFrame({"item_id": [1, 2]}))
    save(tmp_path / "items/b.parquet", pl.DataFrame({"item_id": [3]}))
    table = open_table(tmp_path / "items", "items")
    assert (table.rows, table.part_rows) == (3, (2, 1))
    save(tmp_path / "items/c.parquet", pl.DataFrame({"item_id": ["x"]}))
    with pytest.raises(ContractError, match=r"c\.parquet: `item_id` is String, in part 0 Int64"):
        open_table(tmp_path / "items", "items")


def test_shards_cover_every_row_once_and_in_order(tmp_path: Path) -> None:
    save(tmp_path / "items/a.parquet", pl.DataFrame({"item_id": range(5)}))
    save(tmp_path / "items/b.parquet", pl.DataFrame({"item_id": range(5, 8)}))
    shards = shards_of(open_table(tmp_path / "items", "items"), 2)
    assert [len(read_shard(shard)) for shard in shards] == [2, 2, 1, 2, 1]
    assert pl.concat([read_shard(shard) for shard in shards])["item_id"].to_list() == list(range(8))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_vectors_round_trip_through_parquet(tmp_path: Path, dtype: type) -> None:
    x_ND = (np.arange(12).reshape(4, 3) - 5).astype(dtype)
    frame = pl.DataFrame({"item_id": range(4)}).with_columns(numpy_to_vectors("embedding", x_ND))
    table = open_table(save(tmp_path / "v.parquet", frame), "item_embeddings")
    read = vectors_to_numpy(table.read()["embedding"])
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, x_ND)


def test_lists_and_doubles_are_read_as_float32_vectors(tmp_path: Path) -> None:
    frame = pl.DataFrame({"item_id": [1, 2], "embedding": [[1.0, 2.0], [3.0, 4.0]]})
    table = open_table(save(tmp_path / "v.parquet", frame), "item_embeddings")
    assert table.read().schema["embedding"] == pl.Array(pl.Float32, 2)
    ragged = pl.DataFrame({"item_id": [1, 2], "embedding": [[1.0, 2.0], [3.0]]})
    with pytest.raises(ContractError, match="widths"):
        open_table(save(tmp_path / "r.parquet", ragged), "item_embeddings").read()


def test_a_null_vector_is_refused_where_it_would_shift_the_others() -> None:
    column = pl.Series("embedding", [[1.0, 2.0], None, [3.0, 4.0]], dtype=pl.Array(pl.Float32, 2))
    with pytest.raises(ContractError, match="1 null vectors"):
        vectors_to_numpy(column)


def test_unusable_vectors_are_named_row_by_row() -> None:
    rows = [[1.0, 0.0], None, [float("nan"), 1.0], [0.0, 0.0], [float("inf"), 0.0]]
    column = pl.Series("embedding", rows, dtype=pl.Array(pl.Float32, 2))
    bad = "vector holds NaN or infinity"
    assert faulty_vectors(column).to_list() == [None, "vector is null", bad, "vector is all zeros", bad]


def test_rows_are_split_with_their_reasons() -> None:
    frame = pl.DataFrame(
        {
            "item_id": [1, None, 3],
            "embedding": pl.Series([[1.0], [1.0], [0.0]], dtype=pl.Array(pl.Float32, 1)),
        }
    )
    good, bad = split_rows(frame, "item_embeddings")
    assert good["item_id"].to_list() == [1]
    assert bad.to_dicts() == [
        {"item_id": None, "reason": "item_id is null"},
        {"item_id": 3, "reason": "vector is all zeros"},
    ]
