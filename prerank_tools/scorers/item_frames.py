"""The static item side: items, their content vectors, SID codes, categories and numbers, one row an item."""

# N items (row N stands for any other item), D dims, C codes
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from prerank_tools.errors import ContractError
from prerank_tools.scorers.packing import ItemArrays
from prerank_tools.tables.table import Table
from prerank_tools.tables.vectors import faulty_vectors, vectors_to_numpy


@dataclass(frozen=True)
class Catalogue:
    """Every item that the items table or the embeddings know, in the order of its id."""

    ids: pl.Series
    content_ND: np.ndarray  # float32 [N + 1, D]; zeros where an item has no usable vector
    arrays: ItemArrays  # [N + 1, ...]
    item_blocks: dict[str, int]
    code_sizes: dict[str, int]
    vocabularies: dict[str, tuple[str, ...]]
    levels: int

    @property
    def has_vector(self) -> np.ndarray:
        """Whether an item has a content vector."""
        return np.asarray(self.content_ND.any(axis=1))

    @property
    def category(self) -> np.ndarray | None:
        """Code of the first category column, -1 unknown; None where the items have no category."""
        if not self.vocabularies:
            return None
        return self.arrays.codes_NC[:, self.levels]

    def rows(self, item_ids: pl.Series) -> np.ndarray:
        """Row of each id; N for ids that are not in the catalogue."""
        return codes_of(item_ids, self.ids, unknown=len(self.ids))


def read_catalogue(
    items: Table,
    embeddings: Table,
    *,
    sids: Table | None,
    numbers: Sequence[str],
    vocabularies: Mapping[str, Sequence[str]],
) -> Catalogue:
    """Join the item tables; `vocabularies` gives the category columns to read and their words in order."""
    same_ids(items, embeddings, "item_id")
    frame = items.scan(["item_id", *numbers, *vocabularies]).collect().drop_nulls("item_id")
    vectors = embeddings.scan(["item_id", "embedding", *_scale(embeddings)]).collect()
    ids = pl.concat([frame["item_id"], vectors["item_id"]]).drop_nulls().unique().sort()
    content_ND = _content(ids, vectors)
    numbers_NF = _numbers(ids, frame, numbers)
    levels = _levels(ids, sids)
    words = {name: tuple(vocabulary) for name, vocabulary in vocabularies.items()}
    categories = [_category(ids, frame, name, vocabulary) for name, vocabulary in words.items()]
    codes = np.stack([*levels.T, *categories], axis=1) if levels.size or categories else None
    has_vector = content_ND.any(axis=1, keepdims=True).astype(np.float32)
    arrays = ItemArrays(
        item_NF=np.concatenate([content_ND, has_vector, numbers_NF], axis=1),
        codes_NC=codes if codes is not None else np.zeros((len(ids) + 1, 0), np.int64),
    )
    sizes = {f"level_{level}": int(levels[:, level].max(initial=0)) + 1 for level in range(levels.shape[1])}
    return Catalogue(
        ids=ids,
        content_ND=content_ND,
        arrays=arrays,
        item_blocks={"content": content_ND.shape[1], "has_vector": 1}
        | ({"numbers": len(numbers)} if numbers else {}),
        code_sizes=sizes | {name: len(vocabulary) for name, vocabulary in words.items()},
        vocabularies=words,
        levels=levels.shape[1],
    )


def category_words(items: Table, columns: Sequence[str], *, most: int) -> dict[str, tuple[str, ...]]:
    """The most frequent words of every category column that the items have; ties by the word."""
    found = {}
    for column in columns:
        if column not in items.schema:
            continue
        words = (
            items.scan([column]).select(_word(items.schema[column], column)).collect()[column].drop_nulls()
        )
        counts = words.value_counts().sort(["count", column], descending=[True, False])
        if len(counts):
            found[column] = tuple(counts[column].head(most))
    return found


def codes_of(ids: pl.Series, vocabulary: pl.Series, *, unknown: int = -1) -> np.ndarray:
    """Place of each id in the vocabulary, `unknown` where it has none: int64."""
    places = vocabulary.to_frame("id").with_row_index("place")
    joined = ids.to_frame("id").join(places, on="id", how="left", maintain_order="left")
    return joined["place"].cast(pl.Int64).fill_null(unknown).to_numpy()


def same_ids(one: Table, other: Table, column: str, inner: str = "") -> None:
    """Refuse two tables whose ids can never meet: int64 in one, strings in the other."""
    left, right = (_id_type(table, name) for table, name in ((one, inner or column), (other, column)))
    if left != right:
        raise ContractError(
            f"{one.path}: `{inner or column}` holds {left}, `{column}` in {other.path} holds {right}",
            f"write both as one type, for example pl.col('{column}').cast(pl.String)",
        )


def _id_type(table: Table, column: str) -> str:
    dtype = table.schema[column]
    inner = dtype.inner if isinstance(dtype, (pl.List, pl.Array)) else dtype
    return "integers" if inner.is_integer() else "strings"  # type: ignore[union-attr]


def _scale(embeddings: Table) -> list[str]:
    return ["scale"] if "scale" in embeddings.schema else []


def _content(ids: pl.Series, vectors: pl.DataFrame) -> np.ndarray:
    """Vectors by item; rows without a usable one, and the last, are zeros."""
    usable = vectors.filter(faulty_vectors(vectors["embedding"]).is_null())
    if not len(usable):
        raise ContractError("the item embeddings hold no usable vector", "prerank embed items ITEMS -o emb/")
    x_VD = vectors_to_numpy(usable["embedding"]).astype(np.float32)
    if "scale" in usable.columns:
        x_VD = x_VD * usable["scale"].cast(pl.Float32).to_numpy()[:, None]
    content_ND = np.zeros((len(ids) + 1, x_VD.shape[1]), dtype=np.float32)
    content_ND[codes_of(usable["item_id"], ids)] = x_VD
    return content_ND


def _numbers(ids: pl.Series, frame: pl.DataFrame, columns: Sequence[str]) -> np.ndarray:
    values_NF = np.zeros((len(ids) + 1, len(columns)), dtype=np.float32)
    for place, column in enumerate(columns):
        value = frame[column].cast(pl.Float64).fill_null(0).fill_nan(0).to_numpy()
        values_NF[codes_of(frame["item_id"], ids), place] = np.sign(value) * np.log1p(np.abs(value))
    return values_NF


def _levels(ids: pl.Series, sids: Table | None) -> np.ndarray:
    if sids is None:
        return np.zeros((len(ids) + 1, 0), dtype=np.int64)
    frame = sids.scan(["item_id", "codes"]).collect().drop_nulls()
    depth = len(frame["codes"][0]) if isinstance(frame["codes"].dtype, pl.List) else None
    codes_SL = vectors_to_numpy(frame["codes"].list.to_array(depth) if depth else frame["codes"]).astype(
        np.int64
    )
    rows_S = codes_of(frame["item_id"], ids)
    codes_NL = np.full((len(ids) + 1, codes_SL.shape[1]), -1, dtype=np.int64)
    codes_NL[rows_S[rows_S >= 0]] = codes_SL[rows_S >= 0]
    return codes_NL


def _category(ids: pl.Series, frame: pl.DataFrame, column: str, vocabulary: Sequence[str]) -> np.ndarray:
    words = frame.select(_word(frame.schema[column], column))[column]
    code_N = np.full(len(ids) + 1, -1, dtype=np.int64)
    code_N[codes_of(frame["item_id"], ids)] = codes_of(words, pl.Series(vocabulary, dtype=pl.String))
    return code_N


def _word(dtype: pl.DataType, column: str) -> pl.Expr:
    """A category as text; of a list, its first."""
    value = pl.col(column)
    return (value.list.first() if isinstance(dtype, pl.List) else value).cast(pl.String).alias(column)
