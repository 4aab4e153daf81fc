"""Vectors between Parquet columns and arrays, without a copy where polars allows it."""

# N rows, D dims
from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from prerank_tools.errors import ContractError

ROWS_IN_CACHE = 512
# Outside of these a length squared leaves float32: distances turn infinite, unit vectors NaN.
SHORTEST, LONGEST = 1e-18, 1e18


def vectors_to_numpy(series: pl.Series) -> np.ndarray:
    """The rows of an `Array(dtype, D)` column as x_ND of the same dtype.

    Raises ContractError on a null row: flattening would drop it and shift every later vector onto the
    wrong item.
    """
    if not isinstance(series.dtype, pl.Array):
        raise ContractError(
            f"column `{series.name}` is {series.dtype}, expected a fixed-size array", "cast it with pl.Array"
        )
    if series.null_count():
        raise ContractError(
            f"column `{series.name}` holds {series.null_count()} null vectors", "drop those rows first"
        )
    dims = series.dtype.size
    flat = (
        series.explode(empty_as_null=False, keep_nulls=False)
        if len(series)
        else pl.Series([], dtype=series.dtype.inner)
    )
    values = flat.to_numpy()
    if len(values) != len(series) * dims:
        raise ContractError(f"column `{series.name}` holds vectors of more than one width", "write one width")
    return values.reshape(len(series), dims)


def numpy_to_vectors(name: str, x_ND: np.ndarray) -> pl.Series:
    """x_ND as a column `Array(dtype, D)`; float32, float16, int8, uint8 and uint16 keep their dtype."""
    flat = pl.Series(name, np.ascontiguousarray(x_ND).reshape(-1))
    return (
        flat.reshape(x_ND.shape)
        if len(x_ND)
        else pl.Series(name, [], dtype=pl.Array(flat.dtype, x_ND.shape[1]))
    )


def faulty_vectors(series: pl.Series) -> pl.Series:
    """Per row why a vector cannot be used (null, not finite, zero, out of scale), or null where it can."""
    reasons: list[Any] = [None] * len(series)
    null_N = series.is_null().to_numpy()
    for row in np.flatnonzero(null_N):
        reasons[row] = "vector is null"
    if not null_N.all():
        x_ND = vectors_to_numpy(series.filter(~series.is_null()))
        rows_N = np.flatnonzero(~null_N)
        mass_N = _masses(x_ND)
        for row in rows_N[~np.isfinite(mass_N)]:
            reasons[row] = "vector holds NaN or infinity"
        for row in rows_N[mass_N == 0]:
            reasons[row] = "vector is all zeros"
        out_N = np.isfinite(mass_N) & ((mass_N > LONGEST) | ((mass_N < SHORTEST) & (mass_N > 0)))
        for row in rows_N[out_N]:
            reasons[row] = f"vector is out of scale (below {SHORTEST:g} or above {LONGEST:g})"
    return pl.Series("reason", reasons, dtype=pl.String)


def _masses(x_ND: np.ndarray) -> np.ndarray:
    """Sum of absolute values of each row, or its length: zero for a zero row, not finite for a bad one."""
    mass_N = np.empty(len(x_ND), dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(x_ND), ROWS_IN_CACHE):
            block_ND = x_ND[start : start + ROWS_IN_CACHE].astype(np.float32, copy=False)
            mass_N[start : start + ROWS_IN_CACHE] = np.sqrt(np.einsum("nd,nd->n", block_ND, block_ND))
        # Squares leave float32 long before values do: what is not plainly in range is summed again.
        far_N = ~((mass_N > 1e-15) & (mass_N < 1e15))
        mass_N[far_N] = np.abs(x_ND[far_N].astype(np.float64)).sum(axis=1)
    return mass_N
