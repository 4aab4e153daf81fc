"""The item encoder: text tower, image tower and fusion as one module; what `train encoder` trains."""

# B items, S tokens, C channels, H height, W width, T text dims, I image dims, D output dims

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prerank_tools.encoders.fusion import Fusion
from prerank_tools.encoders.tower import Tower


class ItemEncoder(nn.Module):
    """A dict of tensors -> unit x_BD.

    `input_ids` and `attention_mask` (B, S) with `has_text` (B,), `pixel_values` (B, C, H, W) with `has_image`
    (B,). A modality whose keys are not given is missing for the whole batch; a row whose flag is False is
    replaced by the fusion's placeholder, whatever its tokens or pixels are.
    """

    def __init__(self, text: Tower | None, image: Tower | None, fusion: Fusion) -> None:
        super().__init__()
        self.text = text
        self.image = image
        self.fusion = fusion
        self.dim = fusion.config.dim

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        config = self.fusion.config
        rows = next(iter(inputs.values())).shape[0]
        device = next(self.fusion.parameters()).device
        text_BT, has_text_B = absent(rows, config.text_dim, device)
        image_BI, has_image_B = absent(rows, config.image_dim, device)
        if self.text is not None and "input_ids" in inputs:
            text_BT = self.text(inputs["input_ids"], inputs["attention_mask"])
            has_text_B = inputs.get("has_text", ~has_text_B)
        if self.image is not None and "pixel_values" in inputs:
            image_BI = self.image(inputs["pixel_values"])
            has_image_B = inputs.get("has_image", ~has_image_B)
        return self.fusion(text_BT, image_BI, has_text_B, has_image_B)


def absent(rows: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Vectors of a modality that nobody has, and the flags that say so."""
    return torch.zeros(rows, dim, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
