"""Multi-head latent attention: every head reads keys and values out of one small latent a token.

The form of LLaTTE (arXiv 2601.20083, appendix and figure 1): low-rank queries and keys/values with RMSNorm on
both latents, no rotary branch, no causal mask. Only rows that survive the layer ask (`kept`).
"""

# B users, T tokens, Q tokens that ask, d width, h heads, k head width, r latent width

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class LatentAttention(nn.Module):
    """Attention of the last `kept` rows over all rows, by latents of `query_rank` and `kv_rank` numbers."""

    def __init__(self, width: int, *, heads: int, head_width: int, query_rank: int, kv_rank: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.query_down = nn.Linear(width, query_rank, bias=False)
        self.query_norm = nn.RMSNorm(query_rank)
        self.query_up = nn.Linear(query_rank, heads * head_width, bias=False)
        self.kv_down = nn.Linear(width, kv_rank, bias=False)
        self.kv_norm = nn.RMSNorm(kv_rank)
        self.kv_up = nn.Linear(kv_rank, 2 * heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x_BTd: Tensor, mask_BT: Tensor, *, kept: int) -> Tensor:
        """(B, kept, d): `mask_BT` is true where a token is real."""
        query_BhQk = self._query(x_BTd[:, -kept:])
        key_BhTk, value_BhTk = self._keys_values(self.latent(x_BTd))
        # The mask is always given: without one, torch takes another path, which rounds otherwise.
        mixed = functional.scaled_dot_product_attention(
            query_BhQk, key_BhTk, value_BhTk, mask_BT[:, None, None, :]
        )
        return self._join(mixed)

    def latent(self, x_BTd: Tensor) -> Tensor:
        """(B, T, r): all that a cache must hold of a token."""
        return self.kv_norm(self.kv_down(x_BTd))

    def absorbed(self, x_BQd: Tensor, latent_BTr: Tensor, mask_BT: Tensor) -> Tensor:
        """The same attention straight from the cached latents, up-projections folded into query and output.

        The scale stays sqrt(head width): with sqrt(latent width) the two forms would differ.
        """
        key_hkr, value_hkr = self.kv_up.weight.view(2, self.heads, self.head_width, -1).unbind(0)
        query_BhQr = torch.einsum("bhqk,hkr->bhqr", self._query(x_BQd), key_hkr)
        score_BhQT = torch.einsum("bhqr,btr->bhqt", query_BhQr, latent_BTr) / self.head_width**0.5
        weight_BhQT = score_BhQT.masked_fill(~mask_BT[:, None, None, :], -torch.inf).softmax(dim=-1)
        mixed_BhQr = torch.einsum("bhqt,btr->bhqr", weight_BhQT, latent_BTr)
        return self._join(torch.einsum("bhqr,hkr->bhqk", mixed_BhQr, value_hkr))

    def _query(self, x_BQd: Tensor) -> Tensor:
        return self._heads(self.query_up(self.query_norm(self.query_down(x_BQd))))

    def _keys_values(self, latent_BTr: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.kv_up(latent_BTr).chunk(2, dim=-1)
        return self._heads(key), self._heads(value)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)

    def _join(self, mixed_BhQk: Tensor) -> Tensor:
        return self.out(mixed_BhQk.transpose(1, 2).flatten(2))
