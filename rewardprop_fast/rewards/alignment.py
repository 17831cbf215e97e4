"""The text-image alignment reward: cosine similarity under a small bundled CLIP-like scorer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rewardprop_fast.rewards.scorer import (
    Scorer,
    load_bundled,
    load_tokenizer,
    to_input,
    tokenize,
)
from rewardprop_fast.rewards.text import check_prompts


class AlignmentReward(nn.Module):
    """Cosine similarity of image and prompt, in [-1, 1] (the form of CLIP score, 2103.00020).

    It understands the bundled model's kind of prompt ("a noto style fox on a teal background").
    Two copies trained on different halves of the data ship: train on "reward", watch "heldout".

    Args:
        copy: "reward" or "heldout".

    Raises:
        ConfigError: an unknown copy.
    """

    def __init__(self, copy: str = "reward") -> None:
        super().__init__()
        scorer = load_bundled("alignment", copy)
        assert isinstance(scorer, Scorer)
        self.scorer, self.tokenizer = scorer, load_tokenizer(copy)
        self.name = "alignment"

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        check_prompts(self.name, prompts)
        tokens = tokenize(self.tokenizer, prompts, images.device)
        with torch.autocast(images.device.type, enabled=False):
            return self.scorer(to_input(images, self.scorer.image.stem.weight.dtype), tokens)
