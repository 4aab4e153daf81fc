"""What `eval sid` judges: the SIDs of a table or of an export, with the codebook that decodes them."""

# N items, L levels
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prerank_tools.errors import ContractError
from prerank_tools.export.sid import sid_parts, sid_sizes
from prerank_tools.export.sid_formats import is_export, read_sids
from prerank_tools.quantizers.codebook import Quantizer, load_codebook, quantizer_of
from prerank_tools.tables.table import Table, open_table


@dataclass(frozen=True)
class Sids:
    """Codes by item; a suffix is kept apart, since it parts items without meaning anything."""

    ids: pl.Series
    codes_NL: np.ndarray
    sizes: tuple[int, ...]
    suffix_N: np.ndarray | None = None
    quantizer: Quantizer | None = None
    encoder: str | None = None  # that the codebook was fitted on

    @staticmethod
    def open(path: Path, codebook: Path | None) -> Sids:
        if is_export(path):
            ids, codes_NL = read_sids(path)
            sizes, suffix_N, folder = tuple(int(top) + 1 for top in codes_NL.max(axis=0)), None, codebook
            given_by = None  # an export does not say
        else:
            table = open_table(path, "item_sids")
            given_by = table.lineage.get("codebook")
            ids, codes_NL = (_stacked(parts) for parts in zip(*sid_parts(table), strict=True))
            sizes, suffix_N = sid_sizes(table), None
            if "suffix" in table.schema:
                codes_NL, suffix_N, sizes = codes_NL[:, :-1], codes_NL[:, -1], sizes[:-1]
            folder = codebook or (path / "codebook" if (path / "codebook").is_dir() else None)
        if folder is None:
            return Sids(ids, codes_NL, sizes, suffix_N)
        book = load_codebook(folder)
        _fits(codes_NL, book.sizes, path, folder)
        if given_by not in (None, book.fingerprint):
            raise ContractError(
                f"{folder}: not the codebook of {path}", f"name the one with fingerprint {given_by}"
            )
        return Sids(ids, codes_NL, book.sizes, suffix_N, quantizer_of(book), book.lineage.get("encoder"))


def rows_of(ids: pl.Series, known: pl.Series) -> np.ndarray:
    """Row of each id in `known`, -1 where it is not there."""
    if ids.dtype != known.dtype:
        raise ContractError(
            f"`item_id` is {ids.dtype} in one table, {known.dtype} in the other",
            "write both ids as int64, or both as strings",
        )
    known_frame = known.alias("item_id").to_frame().with_row_index("row")
    joined = (
        ids.alias("item_id").to_frame().join(known_frame, on="item_id", how="left", maintain_order="left")
    )
    return joined["row"].cast(pl.Int64).fill_null(-1).to_numpy()


def check_space(sids: Sids, table: Table) -> None:
    """Refuse to decode into another space than that of the vectors."""
    encoder = table.lineage.get("encoder")
    width = getattr(table.schema["embedding"], "size", None)
    wrong_width = sids.quantizer is not None and width not in (None, sids.quantizer.width)
    if wrong_width or (encoder and sids.encoder and encoder != sids.encoder):
        raise ContractError(
            f"{table.path}: vectors of another encoder than the codebook was fitted on",
            "give the embeddings that were quantized",
        )


def _stacked(parts: Sequence[Any]) -> Any:
    return pl.concat(parts) if isinstance(parts[0], pl.Series) else np.concatenate(parts)


def _fits(codes_NL: np.ndarray, sizes: tuple[int, ...], path: Path, folder: Path) -> None:
    if codes_NL.shape[1] != len(sizes) or (codes_NL.max(axis=0) >= np.array(sizes)).any():
        raise ContractError(
            f"{path}: codes do not fit the codebook {folder} of {' x '.join(map(str, sizes))}",
            "name the codebook that gave these SIDs",
        )
