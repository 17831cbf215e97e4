"""Every operator's cases: what the checks on a device, the timings and the static model go through.

A file per operator, with ``of_layer`` (the cases a layer of a network gives) and ``checks`` (small
and odd shapes, for correctness).
"""

from __future__ import annotations

from benchmarks.cases import (
    attention,
    frozen,
    geglu,
    group_norm_silu,
    guided_ddim_step,
    lora_linear,
)
from benchmarks.cases.networks import NETWORKS, layers
from benchmarks.cases.protocol import Case, Cost
from rewardprop_fast.ops import OPERATORS

_SUITES = (guided_ddim_step, group_norm_silu, geglu, lora_linear, attention, frozen)

__all__ = ["NETWORKS", "Case", "Cost", "check_cases", "layer_cases"]


def layer_cases(network: str, pixels: int, batch: int) -> list[Case]:
    """The distinct calls of one forward pass of a network, of the operators that there are.

    Args:
        network: "sd15" or "sdxl", a UNet, or "vae", the decoder of both.
        pixels: width and height of the image.
        batch: what the network sees: guidance doubles the images for a UNet.
    """
    found = [
        case
        for layer, count in layers(network, pixels, batch).items()
        for suite in _SUITES
        for case in suite.of_layer(layer, count)
    ]
    return _available(found)


def check_cases() -> list[Case]:
    """Small and odd shapes of every operator."""
    return _available([case for suite in _SUITES for case in suite.checks()])


def _available(cases: list[Case]) -> list[Case]:
    return [case for case in cases if case.operator in OPERATORS]
