"""Grow a text model's vocabulary: brand, category and attribute words become one token each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prerank_tools.encoders.transformers_models import OFFLINE, load_model
from prerank_tools.errors import ContractError

WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")


def frequent_words(texts: Iterable[str], *, min_count: int, most: int) -> list[str]:
    """Lower-cased words of the texts, the most frequent first, ties by word."""
    counts = Counter(word.lower() for text in texts for word in WORD.findall(text))
    frequent = sorted((-count, word) for word, count in counts.items() if count >= min_count)
    return [word for _, word in frequent[:most]]


def extend_vocabulary(source: Path, words: Sequence[str], folder: Path) -> list[str]:
    """Save the model of `source` to `folder` with each word that it splits into pieces as a token of its own.

    A new embedding starts as the mean of its pieces', so the text's vector hardly moves at first (MUSE-like
    `extra_vocab`; how to start is ours). Returns the words added.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **OFFLINE)
    model, _ = load_model(source)
    pieces = {word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in words}
    added = [word for word in words if len(pieces[word]) > 1 and word not in tokenizer.get_vocab()]
    known = len(tokenizer)
    tokenizer.add_tokens(added)
    if len(tokenizer) != known + len(added):
        raise ContractError(f"{source}: its tokenizer refuses new words", "leave extra_vocab out")
    grow_embedding(model, len(tokenizer), [pieces[word] for word in added])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return added


@torch.no_grad()
def grow_embedding(model: Any, size: int, pieces: Sequence[Sequence[int]]) -> None:
    """Resize the token table to `size` (spare rows go); its last rows are the means of the given rows."""
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    weight = model.get_input_embeddings().weight
    for row, parts in enumerate(pieces, start=size - len(pieces)):
        weight[row] = old[list(parts)].mean(0)


def train_new_rows(model: Any, added: int) -> nn.Parameter:
    """Let the last `added` rows of a frozen token table learn; one that learns already is left alone."""
    weight: nn.Parameter = model.get_input_embeddings().weight
    if weight.requires_grad:
        return weight
    weight.requires_grad_(True)

    def only_new(grad: Tensor) -> Tensor:
        mask = torch.zeros(len(grad), 1, dtype=grad.dtype, device=grad.device)
        mask[-added:] = 1
        return grad * mask

    weight.register_hook(only_new)
    return weight
