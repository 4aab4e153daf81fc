"""GSU top-K: the past behaviours nearest to each candidate, and their SimTier histogram."""

from __future__ import annotations

from .contract import Column, Contract

GSU_TOPK = Contract(
    name="gsu_topk",
    about="top-K past behaviours a candidate, with SimTier histograms",
    columns=(
        Column("request_id", "id"),
        Column("item_id", "id"),
        Column("n_valid", "number", about="behaviours that had a vector"),
        Column("behavior_ids", "ids", optional=True),
        Column("positions", "codes", optional=True, about="index into the user's past, 0 the oldest"),
        Column("sims", "numbers", optional=True),
        Column("simtier", "codes", optional=True),
        Column("simtier_recent", "codes", optional=True),
    ),
    key=("request_id", "item_id"),
)
