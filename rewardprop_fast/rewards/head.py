"""The head of LAION's aesthetic predictor and of ImageReward: five linear layers in a row.

Keys of both published files: ``layers.{0,2,4,6,7}.{weight,bias}``, widths D-1024-128-64-16-1; the
other numbers are dropout. With nothing between them but dropout, which is off in use, the five are
one linear map.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rewardprop_fast.errors import ModelError
from rewardprop_fast.rewards.pretrained import load_tensors

#: Numbers of the linear layers in the published nn.Sequential.
LAYERS = (0, 2, 4, 6, 7)
KEYS = tuple(f"layers.{number}.{part}" for number in LAYERS for part in ("weight", "bias"))


class LinearHead(nn.Module):
    """(B, D) -> (B,), in fp32 (fp64 for fp64 features) whatever the reward's tower computes in."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weight.to(features.dtype) + self.bias.to(features.dtype)


def load_head(path: str | Path, reward: str, width: int) -> LinearHead:
    """The head in a .safetensors file for features of ``width``. Raises ModelError."""
    return make_head(load_tensors(path, reward, "head"), reward, width, str(path))


def make_head(tensors: Mapping[str, Tensor], reward: str, width: int, where: str) -> LinearHead:
    """The layers multiplied together, in fp64. Raises ModelError for other keys or shapes."""
    check_head(tensors, reward, where)
    if tensors[KEYS[0]].shape[1] != width:
        raise ModelError(
            f"The reward {reward!r}: the head in {where} takes {tensors[KEYS[0]].shape[1]} "
            f"features, the model gives {width}: they do not belong together."
        )
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for number in LAYERS:
        layer = tensors[f"layers.{number}.weight"].double()
        weight = layer @ weight
        bias = layer @ bias + tensors[f"layers.{number}.bias"].double()
    return LinearHead(weight[0], bias[0])


def check_head(tensors: Mapping[str, Tensor], reward: str, where: str) -> None:
    """Refuse what is not this head. Raises ModelError."""
    missing, more = sorted(set(KEYS) - tensors.keys()), sorted(tensors.keys() - set(KEYS))
    if missing or more:
        raise ModelError(
            f"The reward {reward!r}: {where} is not the head of five linear layers: missing are "
            f"{', '.join(missing[:3]) or 'none'}, unknown {', '.join(more[:3]) or 'none'}."
        )
    width = tensors[KEYS[0]].shape[-1]
    for number in LAYERS:
        weight, bias = tensors[f"layers.{number}.weight"], tensors[f"layers.{number}.bias"]
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise ModelError(
                f"The reward {reward!r}: layer {number} of {where} has the shapes "
                f"{tuple(weight.shape)} and {tuple(bias.shape)}; it gets {width} features."
            )
        width = weight.shape[0]
    if width != 1:
        raise ModelError(f"The reward {reward!r}: {where} gives {width} values, not one.")
