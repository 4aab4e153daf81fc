"""Vectors read from their pages are those of the general reader, to which anything unusual is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank_tools.tables import pages
from prerank_tools.tables.pages import plain_vectors
from prerank_tools.tables.table import open_table, read_shard, shards_of
from prerank_tools.tables.vectors import numpy_to_vectors, vectors_to_numpy


def table(path: Path, x_ND: np.ndarray, **options: object) -> Path:
    """A Parquet file with ids before and after the vectors."""
    ids = pl.Series("item_id", [f"i{row}" for row in range(len(x_ND))])
    frame = pl.DataFrame([ids, numpy_to_vectors("embedding", x_ND), ids.alias("after")])
    frame.write_parquet(path, **{"compression": "uncompressed", **options})  # type: ignore[arg-type]
    return path


def vectors(path: Path, offset: int, rows: int) -> np.ndarray | None:
    """What the pages say of the column `embedding`."""
    return plain_vectors(path, "embedding", pl.read_parquet_schema(path)["embedding"], offset, rows)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 400),
    width=st.sampled_from([1, 2, 3, 7, 8, 16, 63, 256]),
    dtype=st.sampled_from([np.float32, np.float16]),
    group=st.sampled_from([1, 17, 64, 512]),
    page=st.sampled_from([64, 1_000, 1 << 20]),
    data=st.data(),
)
def test_any_rows_of_any_file_are_those_of_the_general_reader(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    width: int,
    dtype: type,
    group: int,
    page: int,
    data: st.DataObject,
) -> None:
    x_ND = np.random.default_rng(rows).standard_normal((rows, width)).astype(dtype)
    path = tmp_path_factory.mktemp("pages") / "x.parquet"
    table(path, x_ND, row_group_size=group, data_page_size=page)
    offset = data.draw(st.integers(0, rows - 1))
    taken = data.draw(st.integers(1, rows - offset))
    found = vectors(path, offset, taken)
    if found is not None:  # pages that cut a vector in two are left to the general reader
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, x_ND[offset : offset + taken])
    else:
        assert page < 4 * width * min(group, rows) + 64


def test_a_table_as_prerank_writes_it_is_read_from_its_pages(tmp_path: Path) -> None:
    x_ND = np.random.default_rng(0).standard_normal((5_000, 256)).astype(np.float32)
    path = table(tmp_path / "x.parquet", x_ND, row_group_size=2_048)
    found = vectors(path, 100, 4_321)
    assert found is not None
    np.testing.assert_array_equal(found, x_ND[100:4_421])


@pytest.mark.parametrize("change", ["compressed", "null vector", "null value", "list", "int8", "float64"])
def test_what_is_not_plain_is_left_to_the_general_reader(tmp_path: Path, change: str) -> None:
    x_ND = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    column = numpy_to_vectors("embedding", x_ND)
    if change == "null vector":
        column = pl.Series("embedding", [None, *x_ND[1:].tolist()], dtype=column.dtype)
    elif change == "null value":
        column = pl.Series("embedding", [[None, 1.0, 2.0, 3.0], *x_ND[1:].tolist()], dtype=column.dtype)
    elif change == "list":
        column = column.arr.to_list()
    elif change in ("int8", "float64"):
        column = column.cast(pl.Array(pl.Int8 if change == "int8" else pl.Float64, 4))
    path = tmp_path / "x.parquet"
    compression = "zstd" if change == "compressed" else "uncompressed"
    pl.DataFrame([column]).write_parquet(path, compression=compression)  # type: ignore[arg-type]
    assert vectors(path, 0, 50) is None


def test_files_of_another_writer_are_read_alike(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    x_ND = np.random.default_rng(0).standard_normal((3_000, 16)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(x_ND.reshape(-1)), 16)
    for nullable in (True, False):
        for version in ("1.0", "2.0"):
            field = pa.field("embedding", column.type, nullable=nullable)
            schema = pa.schema([("item_id", pa.int64()), field])
            path = tmp_path / f"{nullable}{version}.parquet"
            pq.write_table(
                pa.table([pa.array(range(3_000)), column], schema=schema),
                path,
                compression="none",
                use_dictionary=False,
                data_page_version=version,
            )
            found = vectors(path, 7, 2_900)
            if found is not None:
                np.testing.assert_array_equal(found, x_ND[7:2_907])
            frame = pl.concat([read_shard(s) for s in shards_of(open_table(path, "item_embeddings"))])
            np.testing.assert_array_equal(vectors_to_numpy(frame["embedding"]), x_ND)


def test_a_flipped_byte_in_footer_or_page_is_never_wrong_rows(tmp_path: Path) -> None:
    """The values themselves carry no checksum; everything around them must agree or is not trusted."""
    x_ND = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    path = table(tmp_path / "x.parquet", x_ND)
    whole = path.read_bytes()
    values = x_ND.tobytes()
    start = whole.index(values)
    for at in [*range(4, start), *range(start + len(values), len(whole) - 4)]:
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        path.write_bytes(bytes(damaged))
        pages._chunks.cache_clear()
        try:
            found = plain_vectors(path, "embedding", pl.Array(pl.Float32, 8), 0, 64)
        except (OSError, OverflowError, MemoryError) as fault:
            pytest.fail(f"byte {at}: {fault!r}")
        if found is not None:
            np.testing.assert_array_equal(found, x_ND)
