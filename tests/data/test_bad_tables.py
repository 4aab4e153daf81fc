"""Contract-breaking logs at every data stage: an error with a hint, or an exact quarantine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prerank_tools.data.pair_stage import Pairs
from prerank_tools.data.request_stage import Requests
from prerank_tools.data.stage import Partition, Split
from prerank_tools.errors import ContractError, PrerankError
from prerank_tools.run.job import RunOptions, run
from prerank_tools.stage import Stage

OPTIONS = RunOptions(workers=1, max_bad=1.0)
STAGES: dict[str, Callable[[Path], Stage]] = {
    "partition": lambda log: Partition(log, buckets=3),
    "split": lambda log: Split(log, at=50),
    "requests": lambda log: Requests(log, start=50),
    "pairs": lambda log: Pairs(("copurchase",), events=log),
}

ids = st.one_of(st.none(), st.integers(0, 5))
times = st.one_of(st.none(), st.integers(0, 100))
rows = st.lists(st.tuples(ids, ids, times), max_size=25)


def table(found: list[tuple[int | None, int | None, int | None]], strings: bool) -> pl.DataFrame:
    log = pl.DataFrame(
        found, schema={"user_id": pl.Int64, "item_id": pl.Int64, "timestamp": pl.Int64}, orient="row"
    )
    return log.with_columns(pl.format("项{}", "item_id").alias("item_id")) if strings else log


@pytest.mark.parametrize("name", STAGES)
@settings(max_examples=12, deadline=None)
@given(found=rows, strings=st.booleans())
def test_null_rows_are_counted_exactly_or_the_log_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    found: list[tuple[int | None, int | None, int | None]],
    strings: bool,
) -> None:
    folder = tmp_path_factory.mktemp("bad")
    log = table(found, strings)
    log.write_parquet(folder / "log.parquet")
    try:
        result = run(STAGES[name](folder / "log.parquet"), folder / "out", OPTIONS)
    except PrerankError as fault:
        assert fault.hint
        assert not (folder / "out").exists()
        return
    assert result.manifest is not None
    good = log.drop_nulls()
    assert result.manifest.counts["rows_in"] == len(log)
    assert result.manifest.counts["quarantined"] == len(log) - len(good)
    reasons = pl.concat(
        [pl.read_parquet(p) for p in (folder / "out" / "quarantine").glob("*.parquet")] or [log.head(0)]
    )
    assert len(reasons) == len(log) - len(good)


BREAKS: dict[str, Callable[[pl.DataFrame], pl.DataFrame]] = {
    "no user": lambda log: log.drop("user_id"),
    "no item": lambda log: log.drop("item_id"),
    "no time": lambda log: log.drop("timestamp"),
    "a float as user": lambda log: log.with_columns(pl.col("user_id").cast(pl.Float64)),
    "a list as item": lambda log: log.with_columns(pl.concat_list("item_id").alias("item_id")),
    "text as time": lambda log: log.with_columns(pl.col("timestamp").cast(pl.String)),
    "milliseconds": lambda log: log.with_columns(pl.col("timestamp") + 1_700_000_000_000),
    "no rows": lambda log: log.clear(),
}


@pytest.mark.parametrize("fault", BREAKS)
@pytest.mark.parametrize("name", STAGES)
def test_a_fault_of_the_table_is_an_error_with_a_hint(tmp_path: Path, name: str, fault: str) -> None:
    log = BREAKS[fault](table([(n % 3, n % 4, n) for n in range(100)], strings=False))
    log.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(ContractError) as caught:
        run(STAGES[name](tmp_path / "log.parquet"), tmp_path / "out", OPTIONS)
    assert "log.parquet" in caught.value.message
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", STAGES)
@settings(max_examples=15, deadline=None)
@given(place=st.floats(0, 1), flip=st.booleans())
def test_a_damaged_file_gives_an_error_or_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, name: str, place: float, flip: bool
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    log = folder / "log.parquet"
    table([(n % 3, n % 4, n) for n in range(100)], strings=True).write_parquet(log)
    whole = log.read_bytes()
    where = int(place * (len(whole) - 1))
    log.write_bytes(
        whole[:where] + bytes([whole[where] ^ 0x55]) + whole[where + 1 :] if flip else whole[:where]
    )
    try:
        result = run(STAGES[name](log), folder / "out", replace(OPTIONS, max_bad=0.0))
    except PrerankError as fault:
        assert fault.message
        assert not (folder / "out").exists()
        return
    assert result.manifest is not None
    assert result.manifest.counts["rows_in"] == 100
