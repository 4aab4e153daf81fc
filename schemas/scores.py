"""Scores: candidates of a request in rank order."""

from __future__ import annotations

from .contract import Column, Contract

SCORES = Contract(
    name="scores",
    about="scored candidates, best first",
    columns=(
        Column("request_id", "id"),
        Column("item_id", "id"),
        Column("rank", "number", about="1 is best"),
        Column("score", "number"),
    ),
    key=("request_id", "item_id"),
    prefixed={"p_": "number"},
)
