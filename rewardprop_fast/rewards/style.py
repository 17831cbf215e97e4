"""The style reward: log-probability of a drawing style under a small bundled classifier."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.rewards.scorer import StyleClassifier, load_bundled, to_input


class StyleReward(nn.Module):
    """log P(style | image), at most 0.

    The classifier knows the four emoji styles the bundled model was trained on. It ships in two
    copies trained on different halves of the data: train on "reward", watch "heldout".

    Args:
        style: one of the classifier's styles.
        copy: "reward" or "heldout".

    Raises:
        ConfigError: an unknown style or copy.
    """

    def __init__(self, style: str = "fluent", copy: str = "reward") -> None:
        super().__init__()
        classifier = load_bundled("style", copy)
        assert isinstance(classifier, StyleClassifier)
        if style not in classifier.styles:
            raise ConfigError(
                f"style is {style!r}; the bundled classifier knows {', '.join(classifier.styles)}."
            )
        self.classifier, self.index = classifier, classifier.styles.index(style)
        self.name = f"style_{style}"

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        # fp32 whatever the caller's autocast: the classifier is small and its logits are compared
        with torch.autocast(images.device.type, enabled=False):
            dtype = self.classifier.image.stem.weight.dtype
            logits = self.classifier(to_input(images, dtype))
            return F.log_softmax(logits, dim=-1)[:, self.index]
