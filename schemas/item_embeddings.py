"""Item embeddings: one vector an item."""

from __future__ import annotations

from .contract import Column, Contract

ITEM_EMBEDDINGS = Contract(
    name="item_embeddings",
    about="one vector an item",
    columns=(
        Column("item_id", "id"),
        Column("embedding", "vector"),
        Column("modalities", "text", optional=True, nullable=True, about="text, image or text+image"),
        Column("content_hash", "any", optional=True, nullable=True, about="changes when the item is edited"),
        Column("scale", "number", optional=True, about="row scale of an int8 vector"),
    ),
    key=("item_id",),
)
