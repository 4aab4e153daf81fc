"""Small real tables that travel with the package; README.md gives their origin and licences."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def sample(name: str) -> Path:
    """Path of one packaged table: `retail_items`, `retail_events` or `grocery_items`."""
    path = Path(str(resources.files(__name__))) / f"{name}.parquet"
    if not path.exists():
        raise FileNotFoundError(f"no sample table {name!r} in {path.parent}")
    return path
