"""The contract of every table that prerank reads or writes, one file a table."""

from __future__ import annotations

from .contract import Column, Contract
from .events import EVENTS
from .gsu_topk import GSU_TOPK
from .item_embeddings import ITEM_EMBEDDINGS
from .item_features import ITEM_FEATURES
from .item_sids import ITEM_SIDS
from .items import ITEMS
from .packed_vectors import PACKED_VECTORS
from .pairs import PAIRS
from .requests import REQUESTS
from .scores import SCORES
from .user_embeddings import USER_EMBEDDINGS
from .user_features import USER_FEATURES
from .user_sids import USER_SIDS

CONTRACTS: dict[str, Contract] = {
    contract.name: contract
    for contract in (
        ITEMS,
        EVENTS,
        REQUESTS,
        PAIRS,
        ITEM_EMBEDDINGS,
        USER_EMBEDDINGS,
        ITEM_SIDS,
        USER_SIDS,
        GSU_TOPK,
        USER_FEATURES,
        ITEM_FEATURES,
        SCORES,
        PACKED_VECTORS,
    )
}

__all__ = ["CONTRACTS", "Column", "Contract"]
