"""Fixtures for every folder of tests."""

from __future__ import annotations

import polars as pl
import pytest

import prerank_tools  # noqa: F401  first: it settles how OpenMP waits, before torch loads it
from tests import fixtures


@pytest.fixture
def chinese_items() -> pl.DataFrame:
    """24 items: twelve products under two Chinese wordings each."""
    return fixtures.chinese_items()


@pytest.fixture
def chinese_events() -> pl.DataFrame:
    """A log over the Chinese items, with string ids, sessions and queries."""
    return fixtures.chinese_events()
