"""`export vectors` from Parquet to Parquet: types, footer, what is kept, refused and measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from prerank_tools.errors import ContractError
from prerank_tools.precision.rows import FORMATS, RowFormat, Rows, decode
from prerank_tools.precision.stage import ExportVectors
from prerank_tools.run.job import Result, RunOptions, run
from prerank_tools.tables.parquet import read_footer
from prerank_tools.tables.vectors import numpy_to_vectors, vectors_to_numpy

X_ND = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)


def write(folder: Path, x_ND: np.ndarray = X_ND, **columns: object) -> Path:
    path = folder / "emb.parquet"
    ids = [f"商品{n}" for n in range(len(x_ND))]
    frame = pl.DataFrame({"item_id": ids, "embedding": numpy_to_vectors("embedding", x_ND), **columns})
    frame.write_parquet(path)
    return path


def export(table: Path, out: Path, format: RowFormat, **options: float) -> Result:
    return run(ExportVectors(table, format=format), out, RunOptions(workers=1, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("format", "dtype", "name"),
    [
        ("int8", pl.Array(pl.Int8, 16), "int8_symmetric_row"),
        ("fp8", pl.Array(pl.UInt8, 16), "fp8_e4m3fn_row"),
        ("uint4", pl.Array(pl.UInt8, 8), "uint4_row_scale_offset"),
    ],
)
def test_rows_decode_to_what_the_quality_says(
    tmp_path: Path, format: RowFormat, dtype: pl.DataType, name: str
) -> None:
    result = export(write(tmp_path, content_hash=["h"] * 300), tmp_path / "out", format)
    part = tmp_path / "out/data/part-00000.parquet"
    frame = pl.read_parquet(part)
    assert frame.schema["embedding"] == dtype
    assert frame["item_id"][7] == "商品7"
    assert frame["content_hash"].to_list() == ["h"] * 300
    assert read_footer(part)["format"] == name
    offset = frame["offset"].to_numpy() if "offset" in frame.columns else None
    rows = Rows(format, 16, vectors_to_numpy(frame["embedding"]), frame["scale"].to_numpy(), offset)
    y_ND = decode(rows).astype(np.float64)
    cosine_N = (X_ND * y_ND).sum(1) / np.linalg.norm(X_ND, axis=1) / np.linalg.norm(y_ND, axis=1)
    assert result.manifest is not None
    quality = result.manifest.quality
    assert quality["mean_cosine"] == pytest.approx(cosine_N.mean(), abs=1e-6)
    assert quality["min_cosine"] == pytest.approx(cosine_N.min(), abs=1e-6)
    assert 0.5 < quality["overlap_at_10"] <= 1
    assert quality["bytes_a_row"] == {"int8": 20, "fp8": 20, "uint4": 16}[format]


def test_int8_keeps_more_than_fp8_and_fp8_more_than_uint4(tmp_path: Path) -> None:
    table = write(tmp_path)
    found = []
    for format in FORMATS:
        manifest = export(table, tmp_path / format, format).manifest
        assert manifest is not None
        found.append(manifest.quality["mean_cosine"])
    assert found == sorted(found, reverse=True)


def test_user_embeddings_keep_their_key(tmp_path: Path) -> None:
    path = tmp_path / "uemb.parquet"
    columns = {"user_id": [3, 3, 9], "as_of": [100, 200, 100], "n_events": [1, 2, 5]}
    pl.DataFrame({**columns, "embedding": numpy_to_vectors("embedding", X_ND[:3])}).write_parquet(path)
    export(path, tmp_path / "out.parquet", "int8")
    frame = pl.read_parquet(tmp_path / "out.parquet")
    assert frame.select("user_id", "as_of", "n_events").to_dict(as_series=False) == columns


def test_int8_input_is_read_with_its_scale(tmp_path: Path) -> None:
    table = write(tmp_path, np.array([[10, -20], [5, 5]], np.int8), scale=[0.5, 2.0])
    export(table, tmp_path / "out.parquet", "fp8")
    frame = pl.read_parquet(tmp_path / "out.parquet")
    assert frame["scale"].to_list() == pytest.approx([10 / 448, 10 / 448])


def test_unusable_rows_are_set_aside(tmp_path: Path) -> None:
    x_ND = X_ND.copy()
    x_ND[4, 2], x_ND[9] = np.nan, 0
    table = write(tmp_path, x_ND)
    with pytest.raises(ContractError, match="2 of 300 rows are unusable"):
        export(table, tmp_path / "out", "int8")
    export(table, tmp_path / "out", "int8", max_bad=0.01)
    assert pl.read_parquet(tmp_path / "out/data/*.parquet").height == 298
    quarantine = pl.read_parquet(tmp_path / "out/quarantine/*.parquet")
    assert quarantine["item_id"].to_list() == ["商品4", "商品9"]


def test_table_without_vectors_is_refused(tmp_path: Path) -> None:
    pl.DataFrame({"item_id": [1]}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(ContractError, match="embedding"):
        export(tmp_path / "items.parquet", tmp_path / "out", "int8")
