"""Batches: which texts share a forward pass, and at what shape, so that little is padding."""

# N texts, S padded length in tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeVar

import numpy as np

T = TypeVar("T")
U = TypeVar("U")
Shape = Literal["sorted", "uniform", "exact"]

EXACT_MULTIPLE = 8
# Products of fewer rows take other kernels, whose sums run in another order (seen below 300 tokens in bf16).
EXACT_MIN_BUDGET = 1024


@dataclass(frozen=True)
class Batch:
    """Positions of the texts in it, and the shape they are padded to; `height` counts dummy rows as well."""

    rows: np.ndarray
    length: int
    height: int


@dataclass(frozen=True)
class Tokens:
    """Token ids of many texts end to end, and where each begins: what batches are filled from."""

    flat: np.ndarray
    starts_N: np.ndarray
    lengths_N: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]]) -> Tokens:
        """From one list of ids a text."""
        lengths_N = np.fromiter((len(tokens) for tokens in ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), np.int64, int(lengths_N.sum()))
        return cls(flat, np.cumsum(lengths_N) - lengths_N, lengths_N)


def cut_batches(
    lengths_N: np.ndarray, *, budget: int, shape: Shape = "sorted", length: int | None = None
) -> list[Batch]:
    """Length-sorted batches of at most `budget` tokens each, longest first (memory peaks at the start).

    "sorted" pads to the longest of a batch. "uniform" puts texts of one length together, so that there is
    neither padding nor a mask. "exact" makes a shape depend on the text's own length alone (a multiple of 8,
    `budget // length` texts), with one dummy row at least: the mask is never all ones, so attention takes one
    path and a text gets the same bytes whatever shares its batch. `length` pads everything to one length.
    """
    budget = max(budget, EXACT_MIN_BUDGET) if shape == "exact" else budget
    padded_N = padded_lengths(lengths_N, shape=shape, length=length)
    order = np.argsort(-padded_N, kind="stable")
    batches, start = [], 0
    while start < len(order):
        width = int(padded_N[order[start]])
        rows = order[start : start + max(1, budget // width)]
        if shape != "sorted":
            rows = rows[padded_N[rows] == width]
        height = max(1, budget // width) + 1 if shape == "exact" else len(rows)
        batches.append(Batch(rows, width, height))
        start += len(rows)
    return batches


def padded_lengths(lengths_N: np.ndarray, *, shape: Shape, length: int | None) -> np.ndarray:
    """The length each text would be padded to in a batch of its own."""
    if length is not None:
        return np.full_like(lengths_N, length)
    if shape == "exact":
        return -(-np.maximum(lengths_N, 1) // EXACT_MULTIPLE) * EXACT_MULTIPLE
    return np.maximum(lengths_N, 1)


def fill_batch(tokens: Tokens, batch: Batch, *, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask (int64, height x length) of one batch; a dummy row is one visible pad token."""
    lengths_B = np.ones(batch.height, dtype=np.int64)
    lengths_B[: len(batch.rows)] = np.maximum(tokens.lengths_N[batch.rows], 1)
    mask_BS = np.arange(batch.length) < lengths_B[:, None]
    ids_BS = np.full(mask_BS.shape, pad_id, dtype=np.int64)
    real_BS = mask_BS[: len(batch.rows)] & (tokens.lengths_N[batch.rows] > 0)[:, None]
    at_BS = tokens.starts_N[batch.rows][:, None] + np.arange(batch.length)
    ids_BS[: len(batch.rows)][real_BS] = tokens.flat[at_BS[real_BS]]
    return ids_BS, mask_BS.astype(np.int64)


def ahead(items: Sequence[T], prepare: Callable[[T], U], *, depth: int = 2) -> Iterator[tuple[T, U]]:
    """Each item with its prepared form, made up to `depth` items ahead in a thread.

    Tokenisers and image decoders release the interpreter lock, so they overlap the forward pass.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as pool:
        waiting = [pool.submit(prepare, item) for item in items[:depth]]
        for position, item in enumerate(items):
            ready = waiting.pop(0).result()
            if position + depth < len(items):
                waiting.append(pool.submit(prepare, items[position + depth]))
            yield item, ready
