"""User SIDs: the semantic ID of each user, coarse code first."""

from __future__ import annotations

from .contract import Column, Contract

USER_SIDS = Contract(
    name="user_sids",
    about="semantic IDs of users",
    columns=(
        Column("user_id", "id"),
        Column("codes", "codes", about="one code a level, coarse to fine"),
        Column("sid", "text"),
        Column("suffix", "number", optional=True, nullable=True),
    ),
    key=("user_id",),
)
