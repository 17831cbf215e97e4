"""Rewards of published sizes without their weights: for memory plans, where the shape counts.

Sources: config.json of openai/clip-vit-large-patch14 (the tower of CLIP score and of LAION's
aesthetic predictor), of laion/CLIP-ViT-H-14-laion2B-s32B-b79K (that of PickScore and HPSv2) and of
google/owlvit-base-patch32; for ImageReward the authors' BLIP (rewards/convert.py).
"""

from __future__ import annotations

from collections.abc import Callable
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

#: Published rewards that are a CLIP and next to nothing more.
_CLIPS = {
    "clip_score": "clip-l",
    "aesthetic": "clip-l",
    "pickscore": "clip-h",
    "hps": "clip-h",
}

_TOKENS = 35  # of a prompt, for ImageReward


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
        features = self.vision(_pixels(images, 224, self.dtype)).image_embeds
        return F.cosine_similarity(features, self.text)


class ShapedImageReward(nn.Module):
    """ImageReward's two encoders: BLIP's ViT-L/16, and BERT that attends to its tokens."""

    name = "image_reward"

    def __init__(self, dtype: torch.dtype) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.dtype = dtype
        vision = BlipVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=16,
        )
        text = BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        seen = self.vision(pixel_values=_pixels(images, 224, self.dtype)).last_hidden_state
        ids = torch.zeros(len(images), _TOKENS, dtype=torch.int64, device=images.device)
        padding = torch.zeros(len(images), 1, 1, _TOKENS, dtype=self.dtype, device=images.device)
        read = self.text.encoder(
            self.text.embeddings(input_ids=ids),
            attention_mask=padding,
            encoder_hidden_states=seen,
        ).last_hidden_state
        return read[:, 0].mean(1)


class ShapedDetection(nn.Module):
    """OWL-ViT base/32 without what encodes the query and what places the boxes."""

    name = "detection"
    query: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        from transformers import OwlViTConfig, OwlViTForObjectDetection

        super().__init__()
        self.dtype = dtype
        model: Any = OwlViTForObjectDetection(OwlViTConfig())
        model.owlvit.text_model = model.owlvit.text_projection = model.box_head = nn.Identity()
        self.model = model
        self.register_buffer("query", torch.zeros(1, 1, 512))
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        features = self.model.image_embedder(pixel_values=_pixels(images, 768, self.dtype))[0]
        queries = self.query.expand(len(images), -1, -1)
        logits = self.model.class_predictor(features.flatten(1, 2), queries)[0]
        return F.logsigmoid(logits.amax(dim=1)).mean(dim=1)


def _pixels(images: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    small = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
    return ((small.clamp(0, 1) - 0.5) / 0.27).to(dtype)


_OTHERS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "image_reward": ShapedImageReward,
    "detection": ShapedDetection,
}

#: Names that `tower` knows.
TOWERS = (*_TOWERS, *_CLIPS, *_OTHERS)


def tower(name: str, dtype: torch.dtype) -> Any:
    """A reward of the size of one of `TOWERS`, on "meta". Raises ConfigError."""
    if name not in TOWERS:
        raise ConfigError(f"There is no reward of the shape {name!r}; there are {list(TOWERS)}.")
    with torch.device("meta"):
        if name in _OTHERS:
            return _OTHERS[name](dtype)
        return ShapedReward(_CLIPS.get(name, name), dtype)
