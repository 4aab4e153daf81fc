"""Packed vectors: low-precision rows for a feature store, with the scale that undoes them."""

from __future__ import annotations

from .contract import Column, Contract

PACKED_VECTORS = Contract(
    name="packed_vectors",
    about="INT8, FP8 or UINT4 rows with their scale",
    columns=(
        Column("item_id", "id", optional=True),
        Column("user_id", "id", optional=True),
        Column("as_of", "time", optional=True),
        Column("embedding", "codes", about="packed bytes, or int8 values"),
        Column("scale", "number"),
        Column("offset", "number", optional=True),
    ),
    one_of=(("item_id", "user_id"),),
)
