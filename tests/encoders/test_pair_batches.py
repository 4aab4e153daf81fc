"""Pairs as batches: what each side shows, which hard negative it faces, and how retrieval is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from prerank_tools.encoders.pair_batches import (
    FeatureContents,
    PairBatches,
    PairRows,
    RawContents,
    retrieval_metrics,
)
from prerank_tools.encoders.pair_frames import read_pairs
from prerank_tools.encoders.pretrain import split_by_group
from prerank_tools.errors import ContractError
from prerank_tools.tables.table import open_table


def features(contents: int = 8) -> FeatureContents:
    x_CD = torch.arange(contents, dtype=torch.float32)[:, None].expand(-1, 2)
    there = torch.ones(contents, dtype=torch.bool)
    return FeatureContents(x_CD, -x_CD, there, there & (torch.arange(contents) < 6))


def rows(**changes: object) -> PairRows:
    """Items 0-5 of titles 0 0 1 2 3 none; queries 6 and 7."""
    table = {
        "query_P": np.array([6, 7, 6, 7]),
        "item_P": np.array([0, 2, 3, 5]),
        "item_text_P": np.array([True, True, False, True]),
        "item_id_C": np.array([0, 1, 2, 3, 4, 5, -1, -1]),
        "group_C": np.array([0, 0, 1, 2, 3, -1, -1, -1]),
    }
    return PairRows(**{**table, **changes})  # type: ignore[arg-type]


def test_both_sides_of_a_batch() -> None:
    batch = PairBatches(rows(), features(), 4).batch(np.array([1, 2]), 0)
    assert batch["query"]["text"][:, 0].tolist() == [7, 6]
    assert batch["item"]["image"][:, 0].tolist() == [-2, -3]
    assert batch["query"]["has_image"].tolist() == [False, False]
    assert batch["item"]["has_text"].tolist() == [True, False]  # the title of pair 2 is its query
    assert batch["item_id"].tolist() == [2, 3] and batch["group"].tolist() == [1, 2]
    assert "hard" not in batch


def test_logged_hard_negatives_come_first_and_change_with_the_epoch() -> None:
    none = np.array([], dtype=np.int64)
    batches = PairBatches(rows(hard=[np.array([1, 4]), none, none, none]), features(), 4)
    first = batches.batch(np.arange(4), 0)
    assert first["has_hard"].tolist() == [True, False, False, False]
    drawn = {int(batches.batch(np.arange(4), epoch)["hard"]["text"][0, 0]) for epoch in range(20)}
    assert drawn == {1, 4}
    again = batches.batch(np.array([0]), 0)
    assert again["hard"]["text"][0, 0] == first["hard"]["text"][0, 0]  # whatever shares its batch


def test_mined_negatives_share_the_category_but_not_the_group() -> None:
    category = np.array([7, 7, 7, 8, -1, 7, -1, -1])
    pairs = rows(item_P=np.array([0, 1, 2, 3]), category_C=category)
    batches = PairBatches(pairs, features(), 4)
    for epoch in range(10):
        batch = batches.batch(np.arange(4), epoch)
        hard = batch["hard"]["text"][:, 0].tolist()
        assert batch["has_hard"].tolist()[3] is False  # alone in its category
        for row, allowed in ((0, {2}), (1, {2}), (2, {0, 1})):  # 0 and 1 share a title
            assert not batch["has_hard"][row] or hard[row] in allowed


def test_raw_contents_pad_tokens_and_leave_out_what_nobody_has() -> None:
    pictures = {1: np.ones((3, 2, 2), np.float32)}
    contents = RawContents(
        [[5, 6, 7], [8], []], np.array([False, True, False]), pictures.__getitem__, pad_id=9
    )
    found = contents.inputs(np.array([0, 1, 2]))
    assert found["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert found["has_text"].tolist() == [True, True, False]
    assert found["pixel_values"].shape == (3, 3, 2, 2) and found["has_image"].tolist() == [False, True, False]
    assert "pixel_values" not in contents.inputs(np.array([0, 2]))
    assert contents.inputs(np.array([0, 1]), np.array([False, True]))["has_text"].tolist() == [False, True]


def test_retrieval_counts_a_tie_half() -> None:
    items = torch.eye(12)
    assert retrieval_metrics(items, items) == {"acc@1": 1.0, "acc@5": 1.0, "recall@10": 1.0}
    # Every score equal: the expected rank is the middle one, 5.5 of 0..11.
    assert retrieval_metrics(torch.ones(12, 1), torch.ones(12, 1)) == {
        "acc@1": 0.0,
        "acc@5": 0.0,
        "recall@10": 1.0,
    }
    shifted = items.roll(1, 0)
    assert retrieval_metrics(shifted, items)["acc@1"] == 0.0


def test_split_keeps_title_groups_whole_and_takes_one_pair_of_each() -> None:
    count = 60
    pairs = PairRows(
        np.arange(count),
        np.arange(count),
        np.ones(count, dtype=bool),
        np.arange(count),
        np.r_[np.arange(40) // 2, np.full(20, -1)],
    )
    split = split_by_group(pairs, share=0.25, most=100, seed=1)
    assert len(split.valid) == 10  # a quarter of 20 titles and 20 untitled items
    valid, fit = pairs.group_C[split.valid.item_P], pairs.group_C[split.fit.item_P]
    assert not (set(valid[valid >= 0]) & set(fit)) and len(set(valid[valid >= 0])) == sum(valid >= 0)
    assert not set(split.valid.item_P) & set(split.fit.item_P)
    assert len(split_by_group(pairs, share=0.25, most=3, seed=1).valid) == 3


def tables(folder: Path, pairs: dict[str, object]) -> tuple[Path, Path]:
    pl.DataFrame(
        {
            "item_id": [10, 11, 12, 13],
            "title": ["Red  Hat", "red hat", "Sock", None],
            "kind": ["a", "a", "b", "b"],
        }
    ).write_parquet(folder / "items.parquet")
    pl.DataFrame(pairs).write_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet", folder / "items.parquet"


def read(folder: Path, pairs: dict[str, object], **words: object) -> object:
    pair_path, item_path = tables(folder, pairs)
    given = {"template": "{title}", "images": False, "root": folder, "max_bytes": 9, **words}
    return read_pairs(open_table(pair_path, "pairs"), open_table(item_path, "items"), **given)  # type: ignore[arg-type]


def test_pairs_meet_their_items(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        {
            "query_text": ["hat", "hat", None, "gone", "no title"],
            "query_item_id": [None, None, 12, None, None],
            "item_id": [10, 11, 10, 99, 13],
            "hard_negatives": [[12, 99], [], None, [], []],
        },
        category="kind",
    )
    pairs = found.pairs  # type: ignore[attr-defined]
    texts = found.texts  # type: ignore[attr-defined]
    assert found.dropped == 2  # type: ignore[attr-defined]
    assert [texts[row] for row in pairs.item_P] == ["Red  Hat", "red hat", "Red  Hat"]
    assert [texts[row] for row in pairs.query_P] == ["hat", "hat", "Sock"]
    assert pairs.query_P[0] == pairs.query_P[1]
    groups = pairs.group_C[pairs.item_P]
    assert groups[0] == groups[1] != pairs.group_C[pairs.query_P[2]]
    assert [texts[row] for row in pairs.hard[0]] == ["Sock"] and len(pairs.hard[1]) == 0
    assert pairs.category_C[pairs.item_P[0]] == pairs.category_C[pairs.item_P[1]]


def test_ids_of_any_integer_type_meet(tmp_path: Path) -> None:
    pairs, items = tables(tmp_path, {"query_text": ["hat"], "item_id": [10]})
    pl.read_parquet(items).with_columns(pl.col("item_id").cast(pl.Int32)).write_parquet(items)
    found = read_pairs(
        open_table(pairs, "pairs"),
        open_table(items, "items"),
        template="{title}",
        images=False,
        root=tmp_path,
        max_bytes=9,
    )
    assert len(found.pairs) == 1


def test_an_image_title_pair_hides_the_title_of_its_item(tmp_path: Path) -> None:
    found = read(
        tmp_path, {"query_text": ["hat", "hat"], "item_id": [10, 11], "kind": ["image_title", "search"]}
    )
    assert found.pairs.item_text_P.tolist() == [False, True]  # type: ignore[attr-defined]


def test_a_pair_without_a_query_and_ids_of_another_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="neither query_text"):
        read(tmp_path, {"query_text": ["hat", None], "item_id": [10, 11]})
    with pytest.raises(ContractError, match="String in the pairs and Int64 in the items"):
        read(tmp_path, {"query_text": ["hat"], "item_id": ["10"]})
