"""Layer normalisation and LoRA linear layers on its result, which is not kept for backward.

A layer normalisation keeps its input and two numbers a row; from these its result, which the
gradient of A asks for, is made again in one pass, bitwise. Kept beside each other they would be the
same tensor twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rewardprop_fast.ops import registry
from rewardprop_fast.ops.lora_linear import op


def layer_norm_lora_linears(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[Tensor, ...]:
    """`lora_linears` of ``layer_norm(x)`` over its last size, with bitwise its gradients.

    Kept for backward: x, its rows' mean and 1 / deviation, and what `lora_linears` keeps beside its
    input. The backward pass normalises x once more.

    Args:
        x: (..., K).
        norm_weight, norm_bias: (K,) or None, the dtype of x, no gradient.
        eps: added to the variance.
        weights, biases, lora_as, lora_bs, scales: as in `lora_linears`, of linear layers.

    Returns:
        The layers' outputs, in order. Gradients flow to x, the A and the B, once differentiable.

    Raises:
        ValueError: as in `lora_linears`, or the normalisation's weight or bias require a gradient,
            or the layers are convolutions.
    """
    trained = any(t is not None and t.requires_grad for t in (norm_weight, norm_bias))
    if trained and torch.is_grad_enabled():
        raise ValueError(
            "the normalisation's weight or bias requires a gradient, and layer_norm_lora_linears "
            "never computes one for it; freeze it with requires_grad_(False), or use lora_linears "
            "on torch.nn.functional.layer_norm(x, ...)."
        )
    if any(weight.dim() != 2 for weight in weights):
        raise ValueError("layer_norm_lora_linears takes linear layers, with weights (N, K).")
    if torch.compiler.is_compiling():  # which decides itself what to make again
        normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        return op.lora_linears(normed, weights, biases, lora_as, lora_bs, scales)
    arguments = op.arguments(x, weights, biases, lora_as, lora_bs, scales)
    *outputs, _ = _NormedLoraLinears.apply(norm_weight, norm_bias, eps, *arguments)
    return tuple(outputs)


class _NormedLoraLinears(torch.autograd.Function):
    """Calls the operations of either, so that whoever watches operations sees those he knows."""

    @staticmethod
    def forward(
        ctx: Any, norm_weight: Any, norm_bias: Any, eps: float, x: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.wish, ctx.eps = registry.current(), eps
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        outputs = tuple(op.FORWARD(normed, *rest))
        ctx.layers = _Layers()
        op.save(ctx.layers, (normed, *rest), outputs)
        ctx.mark_non_differentiable(*ctx.layers.without_gradient)
        input_needed, *others = ctx.layers.take()
        ctx.normed_needed = input_needed is not None
        statistics = (mean, rstd) if x.requires_grad else (None, None)
        kept = x if x.requires_grad or ctx.normed_needed else None
        ctx.save_for_backward(kept, *statistics, norm_weight, norm_bias, *others)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        x, mean, rstd, norm_weight, norm_bias, *others = ctx.saved_tensors
        normed = None
        if ctx.normed_needed:
            normed, _, _ = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, ctx.eps)
        ctx.layers.saved_tensors = (normed, *others)
        ctx.layers.needs_input_grad = ctx.needs_input_grad[3:]
        with registry.under(ctx.wish):
            dnormed, *found = op.gradients(ctx.layers, *grads)
        ctx.layers.take()
        del normed
        dx = None
        if dnormed is not None:
            dx, _, _ = torch.ops.aten.native_layer_norm_backward(
                dnormed, x, x.shape[-1:], mean, rstd, norm_weight, norm_bias, [True, False, False]
            )
        return None, None, None, dx, *found


class _Layers:
    """The linear layers' own context, within that of the Function around them."""

    saved_tensors: tuple[Tensor | None, ...] = ()
    without_gradient: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.without_gradient = tensors

    def take(self) -> tuple[Tensor | None, ...]:
        """What was saved, of which nothing is left here."""
        tensors, self.saved_tensors, self.without_gradient = self.saved_tensors, (), ()
        return tensors
