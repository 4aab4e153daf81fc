"""Batches: which texts share a forward pass, and at what shape, so that little is padding."""

# N texts, S padded length in tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
U = TypeVar("U")

EXACT_MULTIPLE = 8
# Products of fewer rows take other kernels, whose sums run in another order (seen below 300 tokens in bf16).
EXACT_MIN_BUDGET = 1024


@dataclass(frozen=True)
class Batch:
    """Positions of the texts in it, and the shape they are padded to; `height` counts dummy rows as well."""

    rows: np.ndarray
    length: int
    height: int


def cut_batches(
    lengths_N: np.ndarray, *, budget: int, exact: bool = False, length: int | None = None
) -> list[Batch]:
    """Length-sorted batches of at most `budget` tokens each, longest first (memory peaks at the start).

    With `exact`, a shape depends on the text's own length alone (a multiple of 8, `budget // length` texts),
    and at least one row is a dummy: the mask is never all ones, so attention takes one path and a text gets
    the same bytes whatever shares its batch. `length` pads everything to one length (SigLIP wants that).
    """
    budget = max(budget, EXACT_MIN_BUDGET) if exact else budget
    padded_N = padded_lengths(lengths_N, exact=exact, length=length)
    order = np.argsort(-padded_N if exact else -lengths_N, kind="stable")
    batches, start = [], 0
    while start < len(order):
        width = int(padded_N[order[start]])
        rows = order[start : start + max(1, budget // width)]
        if exact:
            rows = rows[padded_N[rows] == width]
        height = max(1, budget // width) + 1 if exact else len(rows)
        batches.append(Batch(rows, width, height))
        start += len(rows)
    return batches


def padded_lengths(lengths_N: np.ndarray, *, exact: bool, length: int | None) -> np.ndarray:
    """The length each text would be padded to in a batch of its own."""
    if length is not None:
        return np.full_like(lengths_N, length)
    if exact:
        return -(-np.maximum(lengths_N, 1) // EXACT_MULTIPLE) * EXACT_MULTIPLE
    return np.maximum(lengths_N, 1)


def pad_batch(ids: Sequence[Sequence[int]], batch: Batch, *, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask (both int64, height x length) of one batch; a dummy row is one visible pad token."""
    ids_BS = np.full((batch.height, batch.length), pad_id, dtype=np.int64)
    mask_BS = np.zeros((batch.height, batch.length), dtype=np.int64)
    for row, position in enumerate(batch.rows):
        tokens = ids[position]
        ids_BS[row, : len(tokens)] = tokens
        mask_BS[row, : len(tokens)] = 1
    mask_BS[mask_BS.sum(axis=1) == 0, 0] = 1
    return ids_BS, mask_BS


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
