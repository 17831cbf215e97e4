"""Cases of `ops.attention`: non-causal, self and cross.

B batch, H heads, Lq queries, Lk keys, D head width.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.networks import AttentionLayer, Layer
from benchmarks.cases.protocol import Arguments, Case, Cost
from benchmarks.cases.shapes import normal
from rewardprop_fast import ops

OPERATOR = "attention"


def of_layer(layer: Layer, count: int) -> list[Case]:
    return [case(layer, count)] if isinstance(layer, AttentionLayer) else []


def checks() -> list[Case]:
    return [
        case(AttentionLayer(*sizes))
        for sizes in (
            (2, 4, 128, 128, 64),
            (1, 1, 1, 3, 8),  # of one key the gradients of q and k are zero: no error to compare
            (2, 3, 67, 77, 40),
            (1, 2, 129, 131, 80),
            (1, 2, 65, 77, 160),
            (2, 2, 200, 77, 64),
            (1, 1, 96, 100, 512),
            (1, 2, 33, 47, 17),
            (1, 2, 100, 90, 96),
            (1, 1, 70, 77, 256),
            (1, 1, 65573, 20, 40),  # more than 2^16 queries
        )
    ]


def case(layer: AttentionLayer, count: int = 1) -> Case:
    name = f"B{layer.batch} H{layer.heads} Lq{layer.queries} Lk{layer.keys} D{layer.width}"
    return Case(
        OPERATOR,
        name,
        partial(_make, layer),
        lambda **arguments: ops.attention(**arguments),
        ("q", "k", "v"),
        {"eager": eager, "sdpa": sdpa, "xformers": xformers},
        partial(_cost, layer),
        count,
    )


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    heads_last = (tensor.transpose(1, 2) for tensor in (q, k, v))
    result: Tensor = memory_efficient_attention(*heads_last).transpose(1, 2)
    return result


def _make(layer: AttentionLayer, device: str, dtype: torch.dtype) -> Arguments:
    """As diffusers has them: (B, L, H, D) in memory, because q, k and v come from linear layers."""

    def heads(length: int) -> Tensor:
        shape = (layer.batch, length, layer.heads, layer.width)
        return normal(*shape, device=device, dtype=dtype).transpose(1, 2)

    return {"q": heads(layer.queries), "k": heads(layer.keys), "v": heads(layer.keys)}


def _cost(layer: AttentionLayer, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """Forward: q, k, v, O, LSE. Backward: these and dO, dq, dk, dv. u is q."""
    rows = layer.batch * layer.heads
    q = rows * layer.queries * layer.width * dtype.itemsize
    k = rows * layer.keys * layer.width * dtype.itemsize
    lse = rows * layer.queries * 4
    product = 2 * rows * layer.queries * layer.keys * layer.width
    return Cost(2 * product, 2 * q + 2 * k + lse, q), Cost(5 * product, 4 * q + 4 * k + lse, q)
