"""Pairs: a query beside the item that answered it; the training data of an encoder."""

from __future__ import annotations

from .contract import Column, Contract

PAIRS = Contract(
    name="pairs",
    about="query and item pairs",
    columns=(
        Column("item_id", "id"),
        Column("query_text", "text", optional=True, nullable=True),
        Column("query_image", "bytes", optional=True, nullable=True),
        Column("query_item_id", "id", optional=True, nullable=True, about="co-purchase: the other item"),
        Column("hard_negatives", "ids", optional=True, nullable=True, about="clicked, not bought"),
        Column("kind", "text", optional=True, about="search, copurchase or image_title"),
        Column(
            "group", "any", optional=True, nullable=True, about="rows of one group never straddle a split"
        ),
        Column("timestamp", "time", optional=True, nullable=True),
    ),
    one_of=(("query_text", "query_image", "query_item_id"),),
)
