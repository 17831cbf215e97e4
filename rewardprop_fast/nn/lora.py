"""peft's LoRA layers on `ops.lora_linear`, their adapters still peft's own.

The fast path covers what training uses: any number of active adapters without dropout, bias or a
variant such as DoRA, on a frozen base. Everything else (merged or disabled adapters, a batch that
mixes adapters) runs in peft's forward, decided at every call, so that all of peft's switches keep
working.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import layer as peft_lora
from torch import Tensor, nn

from rewardprop_fast import ops
from rewardprop_fast.nn.legality import has_hooks, is_frozen, is_plain
from rewardprop_fast.nn.merged import merged


class FastLoraLinear(peft_lora.Linear):
    """peft's LoRA on a linear layer: one product, one pass, and x kept once."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = None if args or kwargs else _on_operators(self, x)
        return super().forward(x, *args, **kwargs) if y is None else y


class FastLoraConv2d(peft_lora.Conv2d):
    """peft's LoRA on a 1x1 convolution, which is a linear layer; on any other, as the original."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = None if args or kwargs else _on_operators(self, x)
        return super().forward(x, *args, **kwargs) if y is None else y


@dataclass(frozen=True)
class Adapted:
    """What `ops.lora_linear` takes beside x."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float


def linears(
    layers: Sequence[Any], x: Tensor, norm: nn.LayerNorm | None = None
) -> tuple[Tensor, ...]:
    """The outputs of several layers on one x: LoRA layers in one call, others one by one.

    With a ``norm`` they are on norm(x), of which LoRA layers keep x alone.
    """
    if any(merged(layer) is not None for layer in layers):
        x = x if norm is None else norm(x)
        return tuple(layer(x) for layer in layers)
    found = [
        adapted(layer, x) if isinstance(layer, FastLoraLinear) and not has_hooks(layer) else None
        for layer in layers
    ]
    together = [layer for layer in found if layer is not None]
    if norm is not None and (len(together) < len(layers) or not _is_made_again(norm, x)):
        x, norm = norm(x), None
    if len(together) < len(layers):
        return tuple(layer(x) for layer in layers)
    run = ops.lora_linears if norm is None else partial(_on_norm, norm)
    return run(
        x,
        [layer.weight for layer in together],
        [layer.bias for layer in together],
        [layer.lora_a for layer in together],
        [layer.lora_b for layer in together],
        [layer.scale for layer in together],
    )


def _on_norm(norm: nn.LayerNorm, x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    return ops.layer_norm_lora_linears(x, norm.weight, norm.bias, norm.eps, *layers)


def _is_made_again(norm: nn.LayerNorm, x: Tensor) -> bool:
    """Whether calling it is no more than normalising rows of x, with weights that are not trained.

    And whether that is of use, where a gradient is asked for.
    """
    weight: Any = norm.weight  # typed Any by torch's stubs: None without affine parameters
    bias: Any = norm.bias
    return (
        torch.is_grad_enabled()
        and type(norm) is nn.LayerNorm
        and norm.normalized_shape == x.shape[-1:]
        and "forward" not in vars(norm)
        and not has_hooks(norm)
        and is_frozen(weight, bias)
        and is_plain(x, weight, bias)
    )


def adapted(layer: Any, x: Tensor) -> Adapted | None:
    """What the operator needs of a peft layer, or None where peft's forward must run."""
    base = layer.base_layer
    if layer.disable_adapters or layer.merged or not _is_pointwise(base) or has_hooks(base):
        return None
    weight, bias = base.weight, base.bias
    if not (is_frozen(weight, bias) and is_plain(x, weight, bias)):
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names or not all(_is_simple(layer, name, x) for name in names):
        return None
    lora_as = [layer.lora_A[name].weight for name in names]
    lora_bs = [layer.lora_B[name].weight for name in names]
    scales = [layer.scaling[name] for name in names]
    if len(names) == 1:
        return Adapted(weight, bias, lora_as[0], lora_bs[0], scales[0])
    # Several adapters are one of the summed rank.
    lora_b = torch.cat([b * scale for b, scale in zip(lora_bs, scales, strict=True)], dim=1)
    return Adapted(weight, bias, torch.cat(lora_as), lora_b, 1.0)


def _on_operators(layer: Any, x: Tensor) -> Tensor | None:
    """What a peft layer gives for x, or None where peft's forward must run."""
    whole = merged(layer)
    if whole is not None:
        return ops.frozen_linear(x, whole.weight, whole.bias)
    parts = adapted(layer, x)
    if parts is None:
        return None
    return ops.lora_linear(x, parts.weight, parts.bias, parts.lora_a, parts.lora_b, parts.scale)


def _is_pointwise(base: nn.Module) -> bool:
    """A linear layer, or a convolution that is one."""
    if isinstance(base, nn.Linear):
        return True
    return (
        isinstance(base, nn.Conv2d)
        and base.kernel_size == base.stride == (1, 1)
        and base.padding == (0, 0)
        and base.groups == 1
    )


def _is_simple(layer: Any, name: str, x: Tensor) -> bool:
    """Whether this adapter is scale B A x, no more."""
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    return (
        name not in layer.lora_variant
        and not layer.lora_bias[name]
        and (isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0)
        and down.weight.dtype == up.weight.dtype
        and down.weight.dtype in (x.dtype, torch.float32)
        and not has_hooks(down, up)
    )
