"""Score packed requests as a server does: user tower a request, item tower a miss, the rest a candidate."""

# B requests, n candidates, N items, K tasks
from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prerank_tools.metrics.probability import recover_downsampled
from prerank_tools.scorers.item_cache import CacheVersion, ItemCache
from prerank_tools.scorers.three_tower import ThreeTower


@dataclass
class TowerRows:
    """Rows that went through each part so far."""

    user: int = 0
    item: int = 0
    candidate: int = 0


class CachedScorer:
    """A model frozen together with its version of the item cache.

    `item_NF` and `codes_NC` are the static features of all items; candidates name their row. `features` is
    the version of those features.
    """

    def __init__(
        self,
        model: ThreeTower,
        item_NF: Tensor,
        codes_NC: Tensor,
        *,
        features: str,
        cache: ItemCache | None = None,
    ) -> None:
        self.model = model.eval()
        self.item_NF, self.codes_NC = item_NF, codes_NC
        self.version = CacheVersion(tower=weights_digest(model), features=features)
        self.cache = cache or ItemCache(model.record_width, device=str(item_NF.device))
        self.rows = TowerRows()

    @torch.inference_mode()
    def probabilities(
        self, user_BF: Tensor, request_n: Tensor, items_n: np.ndarray, cross_nF: Tensor
    ) -> np.ndarray:
        """Calibrated probabilities [n, K]: what the model gives, with negative down-sampling undone."""
        user_Bhx = self.model.user_part(user_BF)
        item_nhx = self.cache.records(self.version, items_n, self._item_records)
        logit_nK = self.model.candidate_part(user_Bhx, request_n, item_nhx, cross_nF)
        self.rows.user += len(user_BF)
        self.rows.candidate += len(cross_nF)
        prob_nK = torch.sigmoid(logit_nK.double()).cpu().numpy()
        return recover_downsampled(prob_nK, self.model.config.negative_rate)

    def _item_records(self, items_m: np.ndarray) -> Tensor:
        rows_m = torch.from_numpy(items_m).to(self.item_NF.device)
        self.rows.item += len(items_m)
        return self.model.item_part(self.item_NF[rows_m], self.codes_NC[rows_m])


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, shapes and bytes of all weights and buffers: the version of a tower."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
