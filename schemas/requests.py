"""Requests: a user, a time and the candidates to rank; as lists, or flat with one row a candidate."""

from __future__ import annotations

from .contract import Column, Contract

REQUESTS = Contract(
    name="requests",
    about="requests with their candidates: a list a request, or one row a candidate",
    columns=(
        Column("request_id", "id"),
        Column("user_id", "id"),
        Column("timestamp", "time"),
        Column("candidates", "ids", optional=True, about="list form"),
        Column("item_id", "id", optional=True, about="flat form: one row a candidate"),
        Column("surface", "text", optional=True, nullable=True),
        Column("stage", "any", optional=True, nullable=True, about="unexposed, exposed, clicked"),
        Column("bid", "any", optional=True, nullable=True),
    ),
    one_of=(("candidates", "item_id"),),
    prefixed={"label_": "any"},
)
