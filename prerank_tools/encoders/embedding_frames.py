"""Frames of `embed items`: rows of `item_embeddings`, and quarantined items with their reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from prerank_tools.encoders.encode import Encoded
from prerank_tools.tables.vectors import numpy_to_vectors

Dtype = Literal["fp32", "fp16", "int8"]
MODALITIES = ["", "text", "image", "text+image"]
POLARS_OF: dict[str, Any] = {"fp32": pl.Float32, "fp16": pl.Float16, "int8": pl.Int8}


def embedding_rows(
    ids: pl.Series, found: Encoded, rows: Sequence[int], hashes: Sequence[str], dtype: Dtype
) -> pl.DataFrame:
    """Rows of `item_embeddings`; int8 rows come with the scale that gives the vector back."""
    every = len(rows) == len(found.x_ND)  # as nearly always: then nothing is copied
    x_ND = found.x_ND if every else found.x_ND[list(rows)]
    made_of = (found.has_text_N * 1 + found.has_image_N * 2)[list(rows)]
    columns: dict[str, Any] = {
        "item_id": ids,
        "embedding": None,
        "modalities": pl.Series(MODALITIES).gather(made_of),
        "content_hash": pl.Series(hashes, dtype=pl.String),
    }
    if dtype == "int8":
        scale_N = np.abs(x_ND).max(axis=1, initial=0) / 127
        x_ND = np.rint(x_ND / np.maximum(scale_N, 1e-12)[:, None]).astype(np.int8)
        columns["scale"] = pl.Series(scale_N, dtype=pl.Float32)
    elif dtype == "fp16":
        x_ND = torch.from_numpy(x_ND).half().numpy()  # numpy's bytes, in a tenth of its time
    columns["embedding"] = numpy_to_vectors("embedding", x_ND)
    return pl.DataFrame(columns)


def empty_rows(id_dtype: pl.DataType, dtype: Dtype, dim: int) -> pl.DataFrame:
    """A table of no rows with the types of the output."""
    none = np.zeros(0, dtype=bool)
    nothing = Encoded(np.zeros((0, dim), np.float32), none, none, [])
    return embedding_rows(pl.Series("item_id", [], dtype=id_dtype), nothing, [], [], dtype)


def faults_frame(ids: pl.Series, reasons: Sequence[str | None]) -> pl.DataFrame:
    """Quarantined items with their reason."""
    return pl.DataFrame({"item_id": ids, "reason": pl.Series(reasons, dtype=pl.String)})
