"""Numbering collisions as GRID does (re-implemented): one scan of all items for every duplicated SID."""

from __future__ import annotations

import numpy as np


def number_by_scans(codes_NL: np.ndarray) -> np.ndarray:
    """Running index of each item among those with its codes (N,): time is items times duplicated SIDs."""
    suffix_N = np.zeros(len(codes_NL), dtype=np.int64)
    sids, count_M = np.unique(codes_NL, axis=0, return_counts=True)
    for sid in sids[count_M > 1]:
        rows = np.flatnonzero((codes_NL == sid).all(axis=1))
        suffix_N[rows] = np.arange(len(rows))
    return suffix_N
