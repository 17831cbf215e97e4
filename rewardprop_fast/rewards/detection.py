"""Objects in the picture, by an OWL-ViT and a text: to be there, to be gone, or to be counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.rewards.owl import Owl


class Detection(nn.Module):
    """log P(the best box shows the query), at most 0; several queries: the mean of theirs.

    P is the detector's own sigmoid. The gradient goes through the best box of each query.

    Args:
        model: folder or hub name of OWL-ViT or OWLv2, such as google/owlvit-base-patch32.
        query: what to look for, as for the detector ("a photo of a dog"), or a list.
        tokenizer: folder or hub name, where the model's has none.

    Raises:
        ConfigError: no query.
        ModelError: not there, of another architecture, not safetensors, or without a tokenizer.
    """

    name = "detection"
    sign = 1

    def __init__(
        self, model: str, query: str | Sequence[str], tokenizer: str | None = None
    ) -> None:
        super().__init__()
        self.owl = Owl(model, query, tokenizer, self.name)

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return F.logsigmoid(self.sign * self.owl(images).amax(dim=1)).mean(dim=1)


class Removal(Detection):
    """log P(not even the best box shows the query), at most 0; several: the mean of theirs.

    Args, Raises: as `Detection`.
    """

    name = "removal"
    sign = -1


class ObjectCount(Detection):
    """How many boxes show a query with more than ``threshold``: whole numbers, so no gradient.

    Overlapping boxes count each, as in transformers' post-processing. Methods that differentiate
    the reward refuse it.

    Args: as `Detection`, and
        threshold: of the detector's sigmoid, 0 to 1.

    Raises: as `Detection`; ConfigError for an impossible threshold.
    """

    name = "object_count"
    differentiable = False

    def __init__(
        self,
        model: str,
        query: str | Sequence[str],
        tokenizer: str | None = None,
        threshold: float = 0.1,
    ) -> None:
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not 0 < threshold < 1:
            raise ConfigError(f"threshold must be a number between 0 and 1, got {threshold!r}.")
        super().__init__(model, query, tokenizer)
        self.threshold = float(threshold)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        best = self.owl(images).amax(dim=2).sigmoid()
        return (best > self.threshold).sum(dim=1).float()
