"""User features: point-in-time statistics of a user."""

from __future__ import annotations

from .contract import Column, Contract

USER_FEATURES = Contract(
    name="user_features",
    about="point-in-time statistics a user and as-of time",
    columns=(Column("user_id", "id"), Column("as_of", "time")),
    key=("user_id", "as_of"),
)
