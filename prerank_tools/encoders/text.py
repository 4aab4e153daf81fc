"""Text vectors: any transformers text model, pooled under its mask, in batches that hold little padding."""

# N texts, B texts in a batch, S tokens, T text dims

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from prerank_tools.encoders.batches import Batch, ahead, cut_batches, pad_batch
from prerank_tools.encoders.tower import GPU_FACTOR, Tower, resolve_precision

Pooling = Literal["mean", "cls", "last"]


class TextTower(Tower):
    """A text model and its pooling: token ids and mask (B, S) -> x_BT in fp32, not normalised."""

    def __init__(self, model: nn.Module, pooling: Pooling, *, dim: int) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.dim = dim

    def forward(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        hidden_BST = self.model(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state
        return pool(hidden_BST, mask_BS, self.pooling)


def pool(hidden_BST: Tensor, mask_BS: Tensor, pooling: Pooling) -> Tensor:
    """One fp32 vector a text: the mean of its visible tokens, its first or its last (padding is right)."""
    if pooling == "cls":
        return hidden_BST[:, 0].float()
    if pooling == "last":
        last_B = mask_BS.sum(dim=1) - 1
        return hidden_BST[torch.arange(len(last_B), device=last_B.device), last_B].float()
    # Summed as one product in fp32: a bf16 sum over long texts would lose what bf16 activations still have.
    weights_BS = mask_BS.float()
    sum_BT = torch.bmm(weights_BS[:, None, :], hidden_BST.float())[:, 0]
    return sum_BT / weights_BS.sum(dim=1, keepdim=True)


class Tokenize(Protocol):
    """Texts -> token ids, special tokens included, cut at `max_tokens`."""

    def __call__(self, texts: Sequence[str], *, max_tokens: int) -> list[list[int]]: ...


@dataclass(frozen=True)
class Tokenizer:
    """What a tower needs of its tokeniser; `fixed_length` where it was trained on one length (SigLIP)."""

    ids_of: Tokenize
    pad_id: int
    max_tokens: int
    fixed_length: int | None = None


class TextEncoder:
    """A tower ready to encode: tokeniser, batching, precision and device.

    With `exact`, a text's bytes depend neither on the budget nor on what shares its batch.
    """

    WINDOW = 8192  # texts sorted by length together; the next window is tokenised during this one's passes

    def __init__(
        self,
        tower: Tower,
        tokenizer: Tokenizer,
        *,
        max_tokens: int = 256,
        token_budget: int = 4096,
        precision: str = "auto",
        exact: bool = False,
        device: str = "cpu",
    ) -> None:
        self.exact = exact
        self.device = torch.device(device)
        # A GPU is busy only with more at once; the number is fixed, so that bytes repeat on one device type.
        self.budget = token_budget * GPU_FACTOR if self.device.type == "cuda" else token_budget
        self.dtype = resolve_precision(precision, self.device)
        self.tower = tower.eval().to(self.device, self.dtype)
        self.dim = tower.dim
        self.tokenizer = tokenizer
        self.max_tokens = min(tokenizer.max_tokens, max_tokens)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors x_NT in float32, in the order of the texts; equal texts are encoded once."""
        unique = list(dict.fromkeys(texts))
        windows = [unique[i : i + self.WINDOW] for i in range(0, len(unique), self.WINDOW)]
        parts = [self._encode_window(ids) for _, ids in ahead(windows, self._ids)]
        x_UT = np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)
        row_of = {text: row for row, text in enumerate(unique)}
        return x_UT[[row_of[text] for text in texts]]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        # A token has seldom more than ten characters: what lies far behind the cut need not be tokenised.
        texts = [text[: 32 * self.max_tokens] for text in texts]
        return self.tokenizer.ids_of(texts, max_tokens=self.max_tokens)

    def _encode_window(self, ids: list[list[int]]) -> np.ndarray:
        batches = cut_batches(
            np.array([len(tokens) for tokens in ids]),
            budget=self.budget,
            exact=self.exact,
            length=self.tokenizer.fixed_length,
        )
        # Results stay on the device until the window ends: a copy after each batch would wait for it.
        x_NT = torch.empty((len(ids), self.dim), device=self.device)
        for batch, tensors in ahead(batches, lambda batch: self._tensors(ids, batch)):
            x_NT[torch.from_numpy(batch.rows).to(self.device)] = self._forward(batch, *tensors)
        return x_NT.cpu().numpy()

    def _tensors(self, ids: list[list[int]], batch: Batch) -> tuple[Tensor, Tensor]:
        ids_BS, mask_BS = (torch.from_numpy(x) for x in pad_batch(ids, batch, pad_id=self.tokenizer.pad_id))
        if self.device.type == "cuda":
            return ids_BS.pin_memory(), mask_BS.pin_memory()
        return ids_BS, mask_BS

    @torch.inference_mode()
    def _forward(self, batch: Batch, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        x_BT = self.tower(
            ids_BS.to(self.device, non_blocking=True), mask_BS.to(self.device, non_blocking=True)
        )
        return normalize(x_BT[: len(batch.rows)], dim=-1)
