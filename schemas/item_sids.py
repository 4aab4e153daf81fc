"""Item SIDs: the semantic ID of each item, coarse code first."""

from __future__ import annotations

from .contract import Column, Contract

ITEM_SIDS = Contract(
    name="item_sids",
    about="semantic IDs of items",
    columns=(
        Column("item_id", "id"),
        Column("codes", "codes", about="one code a level, coarse to fine"),
        Column("sid", "text", about="<a_12><b_3><c_250>"),
        Column("suffix", "number", optional=True, nullable=True),
    ),
    key=("item_id",),
)
