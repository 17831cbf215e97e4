"""CLIP's two towers (arXiv 2103.00020), and the rewards that are their cosine similarity.

Key layouts of the published checkpoints: docs/rewards.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewardprop_fast.errors import ModelError
from rewardprop_fast.rewards.preprocess import Preprocess, at_least_fp32, of_processor
from rewardprop_fast.rewards.pretrained import load_model, load_tokenizer, locate, read_json
from rewardprop_fast.rewards.text import PromptCache


class ClipImages(nn.Module):
    """The image tower of a transformers CLIPModel, with its preprocessing."""

    def __init__(self, clip: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.vision, self.projection = clip.vision_model, clip.visual_projection
        self.preprocess = preprocess
        self.width = self.projection.out_features
        self.dtype = torch.float32

    def compute_in(self, dtype: torch.dtype) -> None:
        """The run's compute dtype."""
        self.dtype = dtype
        self.to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> unit vectors (B, width), at least fp32."""
        with torch.autocast(images.device.type, enabled=False):
            pixels = self.preprocess(images).to(self.dtype)
            features = self.projection(self.vision(pixel_values=pixels).pooler_output)
            return F.normalize(at_least_fp32(features), dim=-1)


def load_clip(
    model: str | Path, reward: str, preprocess: Preprocess | None = None
) -> tuple[Any, ClipImages]:
    """The whole CLIPModel, and its image tower.

    Args:
        model: folder or hub name of a transformers CLIPModel.
        reward: what errors call it.
        preprocess: None is what the model's folder says; the size is the model's.

    Raises:
        ModelError: see `load_model`.
    """
    from transformers import CLIPModel

    clip = load_model(CLIPModel, model, reward, ("clip",))
    side = clip.config.vision_config.image_size
    if preprocess is None:
        location, _ = locate(model, reward)
        found = of_processor(
            read_json(location, "preprocessor_config.json"), Preprocess((side, side)), reward
        )
    else:
        found = replace(preprocess, size=(side, side))
    if found.size != (side, side):
        raise ModelError(
            f"The reward {reward!r}: the model in {model} takes {side} x {side} pixels, but its "
            f"preprocessor_config.json makes {found.size[0]} x {found.size[1]}."
        )
    return clip, ClipImages(clip, found)


class ClipReward(nn.Module):
    """Cosine similarity of image and prompt under a CLIP model, in [-1, 1]: CLIP score.

    Prompts are cut at the model's 77 tokens, as everywhere.

    Args:
        model: folder or hub name of a transformers CLIPModel.
        tokenizer: folder or hub name, where the model's has none.

    Raises:
        ModelError: not there, of another architecture, not safetensors, or without a tokenizer.
    """

    name = "clip_score"
    #: None: as the model's folder says.
    preprocess: Preprocess | None = None

    def __init__(self, model: str, tokenizer: str | None = None) -> None:
        super().__init__()
        clip, self.images = load_clip(model, self.name, self.preprocess)
        text = clip.config.text_config
        words = load_tokenizer(model, tokenizer, self.name, text.vocab_size)
        self.scale = float(clip.logit_scale.exp())

        def encode(prompts: list[str]) -> Tensor:
            tokens = words(
                prompts,
                padding="max_length",
                truncation=True,
                max_length=text.max_position_embeddings,
                return_tensors="pt",
            )
            # Padding comes after the end of the text, which is what is read and which, the
            # attention being causal, does not see it.
            pooled = clip.text_model(input_ids=tokens.input_ids).pooler_output
            return F.normalize(clip.text_projection(pooled), dim=-1)

        self.prompts = PromptCache(self.name, encode, (self.images.width,))

    def similarity(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) cosine of each image with its prompt."""
        features = self.images(images)
        return (features * self.prompts(prompts, features.device, features)).sum(dim=-1)

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return self.similarity(images, prompts)
