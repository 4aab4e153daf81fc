"""Encode items: text and images, then fused; one unit vector an item, or the reason why it has none."""

# N items, M images, T text dims, I image dims, D output dims

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from prerank_tools.encoders.fusion import Fusion, concat_unit
from prerank_tools.encoders.image import ImageEncoder
from prerank_tools.encoders.pictures import Source

FUSION_ROWS = 1024  # every product has this height, so that a row's bytes do not depend on how many there are


class EncodesText(Protocol):
    """TextEncoder and Tfidf: unit vectors, zero where a text says nothing the model knows."""

    @property
    def dim(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Encoded:
    """x_ND (unit rows, zero at a fault), what each row was made of, and its fault or None."""

    x_ND: np.ndarray
    has_text_N: np.ndarray
    has_image_N: np.ndarray
    faults: list[str | None]


@dataclass(frozen=True)
class Encoder:
    """Everything needed to turn content into vectors; without `fusion` two modalities are concatenated."""

    text: EncodesText | None
    image: ImageEncoder | None
    fusion: Fusion | None = None

    @property
    def dim(self) -> int:
        """Width of the output."""
        if self.fusion is not None:
            return self.fusion.config.dim
        return sum(part.dim for part in (self.text, self.image) if part is not None)

    def encode(self, texts: Sequence[str], images: Sequence[Sequence[Source]]) -> Encoded:
        """One row an item; an empty text or an empty list of images is a missing modality."""
        faults: list[str | None] = [None] * len(texts)
        text_NT, has_text_N = self.encode_texts(texts)
        image_NI, has_image_N = self.encode_images(images, faults)
        for row in np.flatnonzero(~has_text_N & ~has_image_N).tolist():
            faults[row] = faults[row] or self._nothing(texts[row])
        x_ND = self._fuse(text_NT, image_NI, has_text_N, has_image_N)
        x_ND[[row for row, fault in enumerate(faults) if fault]] = 0
        return Encoded(x_ND, has_text_N, has_image_N, faults)

    def encode_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Unit rows x_NT and where there is a text the model knows; zeros elsewhere."""
        has_N = np.array([bool(text) for text in texts], dtype=bool)
        if self.text is None:
            return np.zeros((len(texts), self._absent("text_dim")), np.float32), np.zeros_like(has_N)
        if has_N.all():
            x_NT = self.text.encode(texts)
        else:
            x_NT = np.zeros((len(texts), self.text.dim), np.float32)
            x_NT[has_N] = self.text.encode([text for text in texts if text])
        return x_NT, has_N & x_NT.any(axis=1)

    def encode_images(
        self, images: Sequence[Sequence[Source]], faults: list[str | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The mean direction of an item's images; a fault of any of them is a fault of the item."""
        has_N = np.zeros(len(images), dtype=bool)
        if self.image is None:
            return np.zeros((len(images), self._absent("image_dim")), np.float32), has_N
        x_NI = np.zeros((len(images), self.image.dim), np.float32)
        owners = np.repeat(np.arange(len(images)), [len(sources) for sources in images])
        x_MI, reasons = self.image.encode([source for sources in images for source in sources])
        for owner, reason in zip(owners.tolist(), reasons, strict=True):
            faults[owner] = faults[owner] or reason
        if (owners[1:] > owners[:-1]).all():  # one image an item at most: nothing is added up
            x_NI[owners] = x_MI
        else:
            np.add.at(x_NI, owners, x_MI)
        has_N[owners] = True
        return x_NI, has_N

    def _absent(self, dim: str) -> int:
        """Width of a modality without a tower: what the fusion was built for, else none."""
        return getattr(self.fusion.config, dim) if self.fusion is not None else 0

    def _nothing(self, text: str) -> str:
        if text and self.text is not None:
            return "no word of its text is known to the model"
        missing = [name for name, part in (("text", self.text), ("image", self.image)) if part is not None]
        return f"no {' and no '.join(missing)}"

    @torch.inference_mode()
    def _fuse(
        self, text_NT: np.ndarray, image_NI: np.ndarray, has_text_N: np.ndarray, has_image_N: np.ndarray
    ) -> np.ndarray:
        if self.fusion is None and (self.text is None or self.image is None):
            return to_unit(text_NT if self.image is None else image_NI)
        fuse = self.fusion or concat_unit
        x_ND = np.empty((len(text_NT), self.dim), np.float32)
        for start in range(0, len(x_ND), FUSION_ROWS):
            rows = slice(start, start + FUSION_ROWS)
            parts = [padded(part[rows]) for part in (text_NT, image_NI, has_text_N, has_image_N)]
            x_ND[rows] = fuse(*parts)[: len(x_ND[rows])].numpy()
        return x_ND


def to_unit(x_ND: np.ndarray) -> np.ndarray:
    """The same rows at unit length, in place and in blocks that stay in the cache; zeros stay zeros."""
    for start in range(0, len(x_ND), FUSION_ROWS):
        block_ND = x_ND[start : start + FUSION_ROWS]
        block_ND /= np.maximum(np.linalg.norm(block_ND, axis=1, keepdims=True), 1e-12)
    return x_ND


def padded(x: np.ndarray) -> torch.Tensor:
    """The rows of one block, filled up to `FUSION_ROWS` with zeros."""
    block = np.zeros((FUSION_ROWS, *x.shape[1:]), x.dtype)
    block[: len(x)] = x
    return torch.from_numpy(block)
