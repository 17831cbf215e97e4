"""Prompts for reward models: checked, encoded once each, and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.errors import RewardError
from rewardprop_fast.rewards.base import is_fake

#: Prompts that are kept; one of 1024 fp32 features is 4 KiB.
KEPT = 16_384


def check_prompts(reward: str, prompts: Sequence[object]) -> None:
    """Refuse anything but texts. Raises RewardError."""
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise RewardError(
                f"The reward {reward!r} reads the prompts, which must be texts; number {index} is "
                f"a {type(prompt).__name__}: {prompt!r}."
            )


class PromptCache:
    """What a text encoder makes of each prompt, computed once.

    The encoder is not part of the reward's module: it has no gradient and runs once a prompt, so it
    stays in main memory, in fp32, where the reward's image tower goes to the GPU. On tensors
    without values nothing is encoded; the shapes are right.

    Args:
        encode: texts -> (number of texts, ...), on the CPU.
        shape, dtype: of one prompt's.
    """

    def __init__(
        self,
        reward: str,
        encode: Callable[[list[str]], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.reward, self.encode, self.shape, self.dtype = reward, encode, shape, dtype
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[str], device: torch.device, like: Tensor) -> Tensor:
        """(B, *shape) on ``device``. ``like``: the images, to know whether they have values."""
        check_prompts(self.reward, prompts)
        if is_fake(like):
            return like.new_zeros((len(prompts), *self.shape), dtype=self.dtype, device=device)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        if missing:
            with torch.no_grad():
                encoded = self.encode(missing)
            assert encoded.shape == (len(missing), *self.shape), encoded.shape
            for prompt, row in zip(missing, encoded, strict=True):
                self._kept[prompt] = row.clone().to(device)
        for prompt in prompts:
            self._kept.move_to_end(prompt)
        rows = torch.stack([self._kept[prompt].to(device) for prompt in prompts])
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return rows

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptCache:
        """Copies of a reward share it: it holds nothing that changes a value."""
        return self
