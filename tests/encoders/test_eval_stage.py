"""eval embeddings: recall of co-purchases and purity of categories, counted by hand on a small space."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from prerank_tools.encoders.eval_stage import evaluate_embeddings
from prerank_tools.errors import ContractError, UsageError
from prerank_tools.tables.vectors import numpy_to_vectors


@pytest.fixture
def space(tmp_path: Path) -> Path:
    # Two directions: a, b, c one way, d, e, f the other.
    angle = np.radians([0, 1, 3, 90, 91, 93])
    x_ND = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    frame = pl.DataFrame({"item_id": list("abcdef")}).with_columns(numpy_to_vectors("embedding", 3 * x_ND))
    frame.write_parquet(tmp_path / "emb.parquet")
    return tmp_path / "emb.parquet"


def log(tmp_path: Path, baskets: list[str], times: list[int]) -> Path:
    rows = [
        (n, item, time) for n, (items, time) in enumerate(zip(baskets, times, strict=True)) for item in items
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame.write_parquet(tmp_path / "events.parquet")
    return tmp_path / "events.parquet"


def test_items_of_one_basket_that_are_neighbours_are_recalled(space: Path, tmp_path: Path) -> None:
    events = log(tmp_path, ["abc", "de", "a", "f", "f"], [5, 5, 5, 1, 2])
    found = evaluate_embeddings(space, events=events, k=2)["co_purchase"]
    assert found["queries"] == 5
    assert found["recall@2"]["value"] == 1
    # Most popular: a and f (twice each), then b. a is given f and b, b and c are given a and f, d and e too.
    assert found["popularity_recall@2"] == pytest.approx((0.5 + 0.5 + 0.5 + 0 + 0) / 5)
    assert found["chance_recall@2"] == 2 / 5


def test_only_baskets_from_the_start_on_count_and_popularity_is_older(space: Path, tmp_path: Path) -> None:
    events = log(tmp_path, ["ad", "ab", "fe"], [5, 9, 1])
    found = evaluate_embeddings(space, events=events, start=9, k=1)["co_purchase"]
    assert found["queries"] == 2
    assert found["recall@1"]["value"] == 1
    assert found["popularity_recall@1"] == 0.5  # a is the most popular before, b's partner


def test_purity_counts_neighbours_of_the_same_category(space: Path, tmp_path: Path) -> None:
    items = pl.DataFrame({"item_id": list("abcdef"), "kind": ["x", "x", "y", "z", "z", "z"]})
    items.write_parquet(tmp_path / "items.parquet")
    found = evaluate_embeddings(space, items=tmp_path / "items.parquet", categories=["kind"], k=1)
    # b is nearest to a and c, a to b: a and b agree, c does not; d, e, f agree.
    assert found["category"]["kind"]["purity@1"]["value"] == pytest.approx(5 / 6)
    assert found["category"]["kind"]["chance"] == pytest.approx((4 + 1 + 9) / 36)


def test_what_cannot_be_measured_is_said(space: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="have no 10 neighbours"):
        evaluate_embeddings(space)
    with pytest.raises(UsageError, match="needs --items"):
        evaluate_embeddings(space, categories=["kind"], k=1)
    pl.DataFrame({"item_id": ["a"]}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(ContractError, match="no column `kind`"):
        evaluate_embeddings(space, items=tmp_path / "items.parquet", categories=["kind"], k=1)
