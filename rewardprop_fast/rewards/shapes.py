"""Rewards of published sizes without their weights: for memory plans, where the shape counts.

Sources: config.json of openai/clip-vit-large-patch14 (the tower of CLIP score and of LAION's
aesthetic predictor) and of laion/CLIP-ViT-H-14-laion2B-s32B-b79K (that of PickScore and HPSv2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from rewardprop_fast.errors import ConfigError

_TOWERS: dict[str, dict[str, int | str]] = {
    "clip-l": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
    "clip-h": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
}

#: Names that `tower` knows.
TOWERS = tuple(_TOWERS)


class ShapedReward(nn.Module):
    """Cosine similarity of an image tower's and fixed text features: the form of PickScore.

    The image is scaled to 224 x 224, as every CLIP is asked; the text was encoded before.
    """

    text: Tensor

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.dtype = name, dtype
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            config = CLIPVisionConfig(**_TOWERS[name])  # type: ignore[arg-type]
            self.vision = CLIPVisionModelWithProjection(config)
        finally:
            torch.set_default_dtype(before)
        self.register_buffer("text", torch.zeros(1, config.projection_dim, dtype=dtype))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        small = F.interpolate(images, (224, 224), mode="bicubic", antialias=True)
        normalised = (small.clamp(0, 1) - 0.5) / 0.27
        features = self.vision(normalised.to(self.dtype)).image_embeds
        return F.cosine_similarity(features, self.text)


def tower(name: str, dtype: torch.dtype) -> ShapedReward:
    """A reward of the size of "clip-l" or "clip-h", on "meta". Raises ConfigError."""
    if name not in _TOWERS:
        raise ConfigError(f"There is no reward of the shape {name!r}; there are {list(_TOWERS)}.")
    with torch.device("meta"):
        return ShapedReward(name, dtype)
