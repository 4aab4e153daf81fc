"""Item features: point-in-time statistics of an item."""

from __future__ import annotations

from .contract import Column, Contract

ITEM_FEATURES = Contract(
    name="item_features",
    about="point-in-time statistics an item and as-of time",
    columns=(Column("item_id", "id"), Column("as_of", "time")),
    key=("item_id", "as_of"),
)
