"""LoRA layers on one weight, W + s B A, for steps without gradients.

The sum is rounded to the weight's dtype, so in bfloat16 small corrections lose digits that the
layer by itself would have kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_rewardprop_merged"


@dataclass(eq=False)
class Merged:
    """What a layer runs on while it is merged. Its memory stays where it is, for captured steps.

    Attributes:
        weight: W + s B A, in W's shape and dtype.
        bias: the base layer's.
        active: whether it holds now.
    """

    weight: Tensor
    bias: Tensor | None
    active: bool = False


def merged(layer: Any) -> Merged | None:
    """What this LoRA layer runs on in place of its parts, or None where it runs on these."""
    found: Merged | None = vars(layer).get(_ATTRIBUTE)
    if found is None or not found.active or layer.disable_adapters or torch.is_grad_enabled():
        return None
    return found


@contextmanager
def merged_lora(unet: Any) -> Iterator[None]:
    """Inside, LoRA layers of an accelerated network run as plain ones, if without gradients.

    For every layer that `lora_linear` would serve; others run as ever. The merged weights are made
    anew at every entry, from the adapters as they are then, in memory that stays: a second copy of
    the weights that have an adapter.
    """
    from rewardprop_fast.nn.lora import FastLoraConv2d, FastLoraLinear, adapted

    entered = []
    for layer in unet.modules():
        if not isinstance(layer, FastLoraLinear | FastLoraConv2d):
            continue
        weight: Any = layer.base_layer.weight
        parts = adapted(layer, weight)
        if parts is None:
            continue
        found: Merged | None = vars(layer).get(_ATTRIBUTE)
        if found is None or not _fits(found.weight, weight):
            found = Merged(torch.empty_like(weight), parts.bias)
            vars(layer)[_ATTRIBUTE] = found
        found.bias = parts.bias
        _merge(found.weight, weight, parts.lora_a, parts.lora_b, parts.scale)
        entered.append(found)
    for found in entered:
        found.active = True
    try:
        yield
    finally:
        for found in entered:
            found.active = False


def drop_merged(network: nn.Module) -> None:
    """Free the merged weights that `merged_lora` left in a network's layers."""
    for layer in network.modules():
        vars(layer).pop(_ATTRIBUTE, None)


@torch.no_grad()
def _merge(out: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
    wide = torch.promote_types(weight.dtype, lora_a.dtype)
    rows = weight.reshape(weight.shape[0], -1).to(wide)
    total = torch.addmm(
        rows, lora_b.to(wide), lora_a.reshape(len(lora_a), -1).to(wide), alpha=scale
    )
    out.copy_(total.view(weight.shape))


def _fits(memory: Tensor, weight: Tensor) -> bool:
    return (memory.shape, memory.dtype, memory.device) == (
        weight.shape,
        weight.dtype,
        weight.device,
    )
