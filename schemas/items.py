"""Items: what can be recommended, with its text, its image and its categories."""

from __future__ import annotations

from .contract import Column, Contract

ITEMS = Contract(
    name="items",
    about="item catalogue: one row an item",
    columns=(
        Column("item_id", "id"),
        Column("title", "text", optional=True, nullable=True),
        Column("image", "bytes", optional=True, nullable=True, about="encoded picture"),
        Column("image_path", "text", optional=True, nullable=True, about="relative to --image-root"),
    ),
    key=("item_id",),
)
