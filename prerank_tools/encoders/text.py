"""Text vectors: any transformers text model, pooled under its mask, in batches that hold little padding."""

# N texts, B texts in a batch, S tokens, T text dims

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from prerank_tools.encoders.batches import Batch, Shape, Tokens, ahead, cut_batches, fill_batch
from prerank_tools.encoders.tower import (
    GPU_FACTOR,
    InPieces,
    Tower,
    compile_blocks,
    no_log,
    resolve_precision,
)
from prerank_tools.encoders.turns import turn_on
from prerank_tools.encoders.word_frames import WordTable

Pooling = Literal["mean", "cls", "last"]
WINDOW = 8192


class TextTower(Tower):
    """A text model and its pooling: token ids and mask (B, S) -> x_BT in fp32, not normalised."""

    def __init__(self, model: nn.Module, pooling: Pooling, *, dim: int) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.dim = dim

    def forward(self, ids_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
        hidden_BST = self.model(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state
        return pool(hidden_BST, mask_BS, self.pooling)


def pool(hidden_BST: Tensor, mask_BS: Tensor | None, pooling: Pooling) -> Tensor:
    """One fp32 vector a text: the mean of its visible tokens, its first or its last (padding is right)."""
    if pooling == "cls":
        return hidden_BST[:, 0].float()
    if mask_BS is None:
        return hidden_BST[:, -1].float() if pooling == "last" else hidden_BST.float().mean(dim=1)
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
    words: WordTable | None = None  # gives the ids of `ids_of`, many times as fast

    def tokens(self, texts: Sequence[str], *, max_tokens: int) -> Tokens:
        """Token ids of many texts."""
        if self.words is not None:
            return self.words(texts, max_tokens=max_tokens)
        return Tokens.of(self.ids_of(texts, max_tokens=max_tokens))


class TextEncoder:
    """A tower ready to encode: tokeniser, batching, precision and device.

    With `exact`, a text's bytes depend neither on the budget nor on what shares its batch. Where the model
    `masks_freely`, a GPU takes texts of several lengths in one batch; otherwise a mask costs it more than
    batches of one length each. A batch that does not fit in memory runs in halves; `log` is told.
    """

    def __init__(
        self,
        tower: Tower,
        tokenizer: Tokenizer,
        *,
        max_tokens: int = 256,
        token_budget: int = 4096,
        precision: str = "auto",
        exact: bool = False,
        compiled: bool = False,
        masks_freely: bool = False,
        device: str = "cpu",
        log: Callable[..., None] = no_log,
    ) -> None:
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        # A GPU is busy only with more at once; the number is fixed, so that bytes repeat on one device type.
        self.budget = token_budget * GPU_FACTOR if on_gpu else token_budget
        self.dtype = resolve_precision(precision, self.device)
        uniform = on_gpu and not masks_freely and not tokenizer.fixed_length
        self.shape: Shape = "exact" if exact else "uniform" if uniform else "sorted"
        # Texts sorted by length together; the next window is tokenised during this one's passes.
        self.window = WINDOW * GPU_FACTOR if on_gpu else WINDOW
        self.tower = tower.eval().to(self.device, self.dtype)
        if compiled:
            compile_blocks(self.tower, dynamic=True)
        self._in_pieces = InPieces(self.forward, log)
        self._turn = turn_on(self.device)
        self.dim = tower.dim
        self.tokenizer = tokenizer
        self.max_tokens = min(tokenizer.max_tokens, max_tokens)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors x_NT in float32, in the order of the texts; equal texts are encoded once."""
        unique = list(dict.fromkeys(texts))
        windows = [unique[i : i + self.window] for i in range(0, len(unique), self.window)]
        x_UT, start = np.empty((len(unique), self.dim), np.float32), 0
        for window, tokens in ahead(windows, self._tokens):
            self._encode_window(tokens, x_UT[start : start + len(window)])
            start += len(window)
        if len(unique) == len(texts):
            return x_UT
        row_of = {text: row for row, text in enumerate(unique)}
        return x_UT[[row_of[text] for text in texts]]

    def _tokens(self, texts: Sequence[str]) -> Tokens:
        # A token has seldom more than ten characters: what lies far behind the cut need not be tokenised.
        texts = [text[: 32 * self.max_tokens] for text in texts]
        return self.tokenizer.tokens(texts, max_tokens=self.max_tokens)

    def _encode_window(self, tokens: Tokens, out_NT: np.ndarray) -> None:
        batches = cut_batches(
            tokens.lengths_N, budget=self.budget, shape=self.shape, length=self.tokenizer.fixed_length
        )
        # Results stay on the device until the window ends: a copy after each batch would wait for it.
        whole_NT = torch.from_numpy(out_NT)
        x_NT = whole_NT if self.device.type == "cpu" else torch.empty_like(whole_NT, device=self.device)
        made = ahead(batches, lambda batch: self._tensors(tokens, batch))
        first = list(islice(made, 1))  # is there before the GPU's turn is taken
        with self._turn:
            for _, (rows_B, ids_BS, mask_BS) in chain(first, made):
                rows_B = rows_B.to(self.device, non_blocking=True)
                x_NT[rows_B] = self._in_pieces(ids_BS, mask_BS)[: len(rows_B)]
        if x_NT is not whole_NT:
            whole_NT.copy_(x_NT)

    def _tensors(self, tokens: Tokens, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows, ids and mask of a batch; the GPU copies them without waiting for the batch before."""
        ids_BS, mask_BS = fill_batch(tokens, batch, pad_id=self.tokenizer.pad_id)
        rows_B, ids, mask = (torch.from_numpy(array) for array in (batch.rows, ids_BS, mask_BS))
        if self.device.type == "cuda":
            rows_B, ids, mask = rows_B.pin_memory(), ids.pin_memory(), mask.pin_memory()
        return rows_B, ids, None if self.shape == "uniform" else mask

    @torch.inference_mode()
    def forward(self, ids_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Unit vectors (B, T) of one batch, on the device; without a mask every token is visible."""
        ids_BS = ids_BS.to(self.device, non_blocking=True)
        mask_BS = None if mask_BS is None else mask_BS.to(self.device, non_blocking=True)
        return normalize(self.tower(ids_BS, mask_BS), dim=-1)
