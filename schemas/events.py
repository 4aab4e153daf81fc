"""Events: the behaviour log, one row a behaviour."""

from __future__ import annotations

from .contract import Column, Contract

EVENTS = Contract(
    name="events",
    about="behaviour log: one row a behaviour",
    columns=(
        Column("user_id", "id"),
        Column("item_id", "id"),
        Column("timestamp", "time", about="when it happened"),
        Column("ingested_at", "time", optional=True, about="when the log learned of it"),
        Column("action", "text", optional=True, nullable=True, about="impression, click, purchase, ..."),
        Column("value", "number", optional=True, nullable=True),
        Column("duration", "number", optional=True, nullable=True),
        Column("surface", "text", optional=True, nullable=True),
        Column("session_id", "id", optional=True, nullable=True),
        Column("basket_id", "id", optional=True, nullable=True),
        Column("request_id", "id", optional=True, nullable=True),
        Column("query", "text", optional=True, nullable=True),
    ),
)
