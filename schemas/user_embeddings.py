"""User embeddings: one vector a user and an as-of time; consumers join as of."""

from __future__ import annotations

from .contract import Column, Contract

USER_EMBEDDINGS = Contract(
    name="user_embeddings",
    about="one vector a user and as-of time",
    columns=(
        Column("user_id", "id"),
        Column("as_of", "time"),
        Column("embedding", "vector"),
        Column("n_events", "number", optional=True),
        Column("condition", "text", optional=True, nullable=True),
        Column("model_version", "text", optional=True, nullable=True),
    ),
    key=("user_id", "as_of"),
)
