"""Several LoRAs as one: their weighted sum, exactly, or at a smaller rank with the error shown.

Legend: M outer and K inner width of a layer, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.lora.files import LayerLoRA

Layers = Mapping[str, LayerLoRA]


@dataclass(frozen=True)
class Compression:
    """What a smaller rank costs: `||W - W'|| / ||W||` of the corrections to the weights, Frobenius.

    Attributes:
        error: of all layers together.
        worst: of the layer that lost most, and its name.
    """

    error: float
    worst: float
    worst_layer: str


def mix(parts: Sequence[tuple[Layers, float]], *, keep_all: bool = False) -> dict[str, LayerLoRA]:
    """`sum_i w_i (alpha_i / r_i) B_i A_i`, exactly, by laying the ranks side by side.

        B = [s_1 B_1, s_2 B_2, ...],  A = [A_1; A_2; ...],  alpha = R = r_1 + r_2 + ...,

    s_i = w_i alpha_i / r_i. LoRAs may differ in rank, alpha and layers: a layer's rank is the sum
    over those that have it.

    Args:
        parts: (layers, weight) each; a weight may be negative or above 1.
        keep_all: lay parts of weight 0 down, too, so that shapes do not depend on the weights.

    Raises:
        ConfigError: no part, a weight that is not finite, or nothing but weights of 0.
    """
    if not parts:
        raise ConfigError("There is no LoRA to mix; give at least one.")
    for _, weight in parts:
        if not math.isfinite(weight):
            raise ConfigError(f"A LoRA's weight is {weight}; it must be a finite number.")
    used = [(layers, weight) for layers, weight in parts if weight or keep_all]
    if not used:
        raise ConfigError("Every weight is 0, so nothing is left of the LoRAs.")
    names = list(dict.fromkeys(name for layers, _ in used for name in layers))
    return {name: _side_by_side(name, used) for name in names}


def _side_by_side(name: str, parts: Sequence[tuple[Layers, float]]) -> LayerLoRA:
    downs, ups = [], []
    for layers, weight in parts:
        if name in layers:
            layer = layers[name]
            downs.append(_at_least_fp32(layer.down))
            ups.append(weight * layer.alpha / layer.rank * _at_least_fp32(layer.up))
    shapes = {(down.shape[1:], up.shape[:1]) for down, up in zip(downs, ups, strict=True)}
    if len(shapes) > 1:
        raise ConfigError(
            f"The LoRAs have different widths at {name}, {sorted(map(str, shapes))}: they were "
            "trained on different models."
        )
    down = torch.cat(downs)
    return LayerLoRA(down, torch.cat(ups, dim=1), float(down.shape[0]))


def compress(layers: Layers, rank: int) -> tuple[dict[str, LayerLoRA], Compression]:
    """The nearest LoRA of at most this rank (Eckart and Young 1936), layer by layer, in float64.

    The product B A is never formed: with B = Q_b R_b and A^T = Q_a R_a the singular values of B A
    are those of the small R_b R_a^T. Layers of at most this rank stay as they are.

    Raises:
        ConfigError: a rank below 1.
    """
    if rank < 1:
        raise ConfigError(f"rank is {rank}; it must be a whole number of at least 1.")
    found: dict[str, LayerLoRA] = {}
    lost, whole, worst, worst_layer = 0.0, 0.0, 0.0, ""
    for name, layer in layers.items():
        up_MR, down_RK = layer.up.double().flatten(1), layer.down.double().flatten(1)
        q_b, r_b = torch.linalg.qr(up_MR * (layer.alpha / layer.rank))
        q_a, r_a = torch.linalg.qr(down_RK.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        squares = s.square()
        whole += float(squares.sum())
        if layer.rank <= rank:
            found[name] = layer
            continue
        rest = float(squares[rank:].sum())
        lost += rest
        share = math.sqrt(rest / float(squares.sum())) if rest else 0.0
        if share >= worst:
            worst, worst_layer = share, name
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        up = (q_b @ u[:, :kept] * root).reshape(-1, kept, *layer.up.shape[2:])
        down = (root[:, None] * vh[:kept] @ q_a.T).reshape(kept, *layer.down.shape[1:])
        dtype = layer.up.dtype
        found[name] = LayerLoRA(down.to(dtype), up.to(dtype), float(kept))
    return found, Compression(math.sqrt(lost / whole) if lost else 0.0, worst, worst_layer)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
