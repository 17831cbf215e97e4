"""Telling torch about an operator: its schema, its fake kernel, its gradient.

The cheapest boundary torch offers, about half the cost of ``torch.library.custom_op`` with
``register_autograd``: define and impl, a fake kernel, one ``autograd.Function``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rewardprop_fast.ops import registry, triton_runtime

_library = torch.library.Library("rewardprop_fast", "FRAGMENT")

_VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_BELOW_VIEW_TRACKING = torch._C._after_autograd_keyset - _VIEW_TRACKING


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``rewardprop_fast::<schema>`` and return what calls it.

    Args:
        schema: "name(Tensor x, float? y) -> Tensor", in torch.library's language.
        kernel: computes it, on every device, without gradients.
        fake: its shapes, strides and dtypes alone, for compilers and memory estimates. Both check
            their arguments.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    recorded = triton_runtime.recorded(kernel, fake)
    fake_kernel = registry.observed(kernel, fake, otherwise=recorded)
    torch.library.register_fake(f"rewardprop_fast::{name}", fake_kernel, lib=_library)
    return getattr(torch.ops.rewardprop_fast, name).default


def differentiable(
    operator: Any,
    save: Callable[[Any, tuple[Any, ...], Any], None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> Any:
    """Give what `define` returned its gradient, once differentiable.

    Args:
        save: ``save(ctx, arguments, output)`` keeps on ``ctx`` what the backward pass needs, with
            ``ctx.save_for_backward`` for tensors, and marks outputs that carry no gradient.
        gradients: ``gradients(ctx, *grad_outputs)`` gives one gradient or None for each argument;
            ``ctx.needs_input_grad`` has one entry for each. A gradient that is not needed should
            not be computed. Where several outputs carry gradients, some may be None.

    Only tensors that are arguments themselves carry gradients, not those inside lists.

    Returns:
        The Function that is applied where a gradient is needed.
    """

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.wish = registry.current()
        output = _below_autograd(operator, keyset, args)
        if isinstance(output, list):  # a schema's Tensor[]: a Function knows tuples alone
            output = tuple(output)
        save(ctx, args, output)
        return output

    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        # On a GPU this runs in autograd's own thread, which knows nothing of the caller's context.
        with registry.under(ctx.wish):
            return (None, *gradients(_Arguments(ctx), *grads))

    name = operator._schema.name.partition("::")[2]
    function: Any = type(
        f"{name}_function",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def autograd(keyset: Any, *args: Any) -> Any:
        # Function.apply makes a node even where nothing needs one; the no-grad prefix goes past it.
        if torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        ):
            return function.apply(keyset, *args)
        return _below_autograd(operator, keyset, args)

    _library.impl(name, autograd, "Autograd", with_keyset=True)
    return function


class _Arguments:
    """The autograd context as the operator's own arguments see it, without the dispatch keys."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.needs_input_grad: tuple[bool, ...] = ctx.needs_input_grad[1:]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _below_autograd(operator: Any, keyset: Any, args: tuple[Any, ...]) -> Any:
    """Run the kernel, whose operations autograd does not see.

    Nor does its tracking of views: an output that is a reshaped intermediate result is a tensor of
    its own to the caller, who may write into it (peft does, where a batch mixes adapters).
    """
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_VIEW_TRACKING):
        return operator.redispatch(keyset & _BELOW_VIEW_TRACKING, *args)
