"""Dual encoders (CLIP and SigLIP families): the text half and the image half as towers in one space."""

# B rows, S tokens, C channels, H height, W width, D dims of the shared space

from __future__ import annotations

from typing import Any

from torch import Tensor

from prerank_tools.encoders.tower import Tower

# Trained on texts padded to one length, without a mask: another length or a mask gives other vectors.
FIXED_LENGTH_MODELS = ("siglip", "siglip2")


def is_dual(config: Any) -> bool:
    """Does a transformers config describe a text half and an image half?"""
    return hasattr(config, "text_config") and hasattr(config, "vision_config")


def shared_dim(config: Any) -> int:
    """Width of the space both halves project into."""
    return int(getattr(config, "projection_dim", None) or config.text_config.hidden_size)


def fixed_length(config: Any) -> int | None:
    """The padded length that the text half was trained on, None where a mask hides the padding."""
    if config.model_type in FIXED_LENGTH_MODELS:
        return int(config.text_config.max_position_embeddings)
    return None


class DualTextTower(Tower):
    """Token ids and mask (B, S) -> x_BD in fp32, not normalised."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.dim = shared_dim(model.config)
        self.masked = fixed_length(model.config) is None

    def forward(self, ids_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
        mask = {"attention_mask": mask_BS} if self.masked else {}
        return features(self.model.get_text_features(input_ids=ids_BS, **mask))


class DualImageTower(Tower):
    """Pixels (B, C, H, W) -> x_BD in fp32, not normalised."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.dim = shared_dim(model.config)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return features(self.model.get_image_features(pixel_values=pixels_BCHW))


def features(out: Any) -> Tensor:
    """The vectors of `get_*_features`: a tensor, or since transformers 5 an output that holds it."""
    return (out if isinstance(out, Tensor) else out.pooler_output).float()
