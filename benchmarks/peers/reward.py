"""A small CLIP-like reward of random weights, in plain torch: the same code in each environment."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SIDE, _PATCH, _WIDTH, _HEADS, _LAYERS = 64, 8, 128, 4, 2


class Reward(nn.Module):
    """Cosine of an image's and its prompt's embedding; images (B, 3, H, W) in [0, 1] -> (B,)."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.patches = nn.Conv2d(3, _WIDTH, _PATCH, _PATCH)
            self.places = nn.Parameter(torch.randn(1, (_SIDE // _PATCH) ** 2, _WIDTH) * 0.1)
            layer = nn.TransformerEncoderLayer(
                _WIDTH, _HEADS, 2 * _WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
            )
            self.layers = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
            self.project = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.requires_grad_(False).eval()

    def forward(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any] = ()
    ) -> Tensor:
        images = nn.functional.interpolate(
            images.float(), size=(_SIDE, _SIDE), mode="bilinear", align_corners=False
        )
        # wide: pictures of a random model are close to grey
        tokens = self.patches((images - 0.5) * 8).flatten(2).transpose(1, 2) + self.places
        features = self.project(self.layers(tokens).mean(1))
        wanted = torch.stack([_embedding(prompt) for prompt in prompts]).to(features.device)
        return nn.functional.cosine_similarity(features, wanted)


def _embedding(prompt: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(str(prompt).encode()).digest()[:4], "little")
    return torch.randn(_WIDTH, generator=torch.Generator().manual_seed(seed))
