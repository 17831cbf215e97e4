"""Annealed importance guidance: from the base model to the tuned one along the chain."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rewardprop_fast.lora.inject import disabled


class Annealed:
    """A UNet for a chain of T steps whose i-th prediction is between base and tuned model.

        eps = eps_base + (i/T)^p (eps_tuned - eps_base),   i = 1..T

    (2409.06493, section 4): early steps, which decide what an image shows, are the base model's,
    and with them its diversity; the last one is the tuned model's alone. p = 0 is the tuned model,
    and the larger p the longer the base model decides. Two UNet calls a step, without gradients.

    Calls must come in the order of the chain, chain after chain.

    Args:
        unet: with a LoRA.
        steps: T.
        power: p, at least 0.
    """

    def __init__(self, unet: nn.Module, steps: int, power: float) -> None:
        self.unet, self.steps, self.power = unet, steps, power
        self._done = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._done = self._done % self.steps + 1
        share = (self._done / self.steps) ** self.power
        tuned = self.unet(*args, **kwargs)
        if share == 1:
            return tuned
        with disabled(self.unet):
            base = self.unet(*args, **kwargs)
        return (torch.lerp(base[0], tuned[0], share), *tuned[1:])
