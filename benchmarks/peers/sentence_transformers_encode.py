"""Baseline: titles to vectors with sentence-transformers, Parquet to Parquet, as its documentation shows."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import torch
from sentence_transformers import SentenceTransformer


def embed(items: Path, out: Path, model: Path, *, bf16: bool = False) -> None:
    """Load the model, encode with its defaults (batches of 32, sorted by length), write fp32 vectors."""
    settings = {"model_kwargs": {"dtype": torch.bfloat16}} if bf16 else {}
    encoder = SentenceTransformer(str(model), device="cpu", **settings)
    frame = pl.read_parquet(items)
    x_ND = encoder.encode(frame["title"].to_list(), show_progress_bar=False)
    frame.select("item_id", pl.Series("embedding", x_ND)).write_parquet(out, compression="uncompressed")
