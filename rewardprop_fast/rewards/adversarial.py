"""A picture that an image classifier takes for something: any classifier of transformers."""

from __future__ import annotations

import difflib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewardprop_fast.errors import ConfigError, ModelError
from rewardprop_fast.rewards.preprocess import Preprocess, at_least_fp32, of_processor
from rewardprop_fast.rewards.pretrained import load_model, locate, read_json


class Adversarial(nn.Module):
    """log P(target | picture), at most 0, by an image classifier.

    As in DRaFT (arXiv 2309.17400): pictures that an eye takes for what the prompt says, and a
    classifier for something else.

    Args:
        model: folder or hub name of a classifier with config.json, model.safetensors and
            preprocessor_config.json, such as google/vit-base-patch16-224.
        target: a class by number or by its name in the model's config.

    Raises:
        ConfigError: an unknown target.
        ModelError: not there, not safetensors, no classifier, or with a preprocessing not known.
    """

    name = "adversarial"

    def __init__(self, model: str, target: int | str) -> None:
        super().__init__()
        from transformers import AutoModelForImageClassification

        self.model = load_model(AutoModelForImageClassification, model, self.name)
        location, _ = locate(model, self.name)
        config = read_json(location, "preprocessor_config.json")
        if config is None:
            raise ModelError(
                f"The reward {self.name!r}: {model} has no preprocessor_config.json, which says "
                "how the classifier takes its pictures."
            )
        self.preprocess = of_processor(config, Preprocess((224, 224)), self.name)
        self.target = _index(target, self.model.config.id2label)
        self.dtype = torch.float32

    def compute_in(self, dtype: torch.dtype) -> None:
        """The run's compute dtype."""
        self.dtype = dtype
        self.model.to(dtype)

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            logits = self.model(pixel_values=self.preprocess(images).to(self.dtype)).logits
            return F.log_softmax(at_least_fp32(logits), dim=-1)[:, self.target]


def _index(target: object, names: dict[int, str]) -> int:
    if isinstance(target, int) and not isinstance(target, bool) and target in names:
        return target
    if isinstance(target, str):
        found = [index for index, name in names.items() if name == target]
        if len(found) == 1:
            return int(found[0])
    close = difflib.get_close_matches(str(target), names.values(), n=1)
    suggestion = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"The reward 'adversarial': target is {target!r}; allowed: a number from 0 to "
        f"{len(names) - 1}, or one name of the classifier's config.{suggestion}"
    )
