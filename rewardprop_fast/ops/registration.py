"""Telling torch about an operator: its schema, its fake kernel, its gradient.

The cheapest boundary torch offers, about half the cost of ``torch.library.custom_op`` with
``register_autograd``: define and impl, a fake kernel, one ``autograd.Function``. And where nobody
listens between the caller and the kernel (no compiler, no mode, no profiler, plain tensors), not
even that: `Boundary` calls the kernel itself, which saves 5 to 10 microseconds a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from rewardprop_fast.ops import registry, triton_runtime

_library = torch.library.Library("rewardprop_fast", "FRAGMENT")

#: By overload: what ``_library`` itself cannot be asked for.
_kernels: dict[Any, Callable[..., Any]] = {}

_VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_BELOW_VIEW_TRACKING = torch._C._after_autograd_keyset - _VIEW_TRACKING


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Boundary:
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
    boundary = Boundary(getattr(torch.ops.rewardprop_fast, name).default, kernel)
    _kernels[boundary.overload] = kernel
    return boundary


def kernel_of(overload: Any) -> Callable[..., Any] | None:
    """What computes one of the library's operators, behind the dispatcher; None for others."""
    return _kernels.get(overload)


class Boundary:
    """What the library itself calls an operator by: torch's dispatcher, or the way past it."""

    def __init__(self, overload: Any, kernel: Callable[..., Any]) -> None:
        self.overload = overload
        self.redispatch = overload.redispatch
        self.kernel = kernel
        #: What `differentiable` makes: all outputs, and the first alone.
        self.function: Any = None
        self.function_of_first: Any = None

    def __call__(self, *args: Any) -> Any:
        needed = _gradient_past_dispatcher(args)
        if needed is None:
            return self.overload(*args)
        if not needed:
            return _below_autograd(self, None, args)
        # Without a gradient of its own, autograd's answer is the dispatcher's.
        return self.overload(*args) if self.function is None else self.function.apply(*args)

    def first(self, *args: Any) -> Any:
        """The first output, where the others are there for the backward pass alone."""
        needed = _gradient_past_dispatcher(args)
        if needed is None:
            return self.overload(*args)[0]
        if not needed:
            return _below_autograd(self, None, args)[0]
        return self.function_of_first.apply(*args)


def _gradient_past_dispatcher(args: tuple[Any, ...]) -> bool | None:
    """None where the dispatcher must see this call, otherwise whether it needs a gradient."""
    if torch.compiler.is_compiling() or not _is_unobserved():
        return None
    needed = False
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if arg.is_meta:
                return None
            needed = needed or arg.requires_grad
        elif kind not in _NUMBERS and not _is_plain(arg):
            return None
    return needed and torch.is_grad_enabled()


_NUMBERS = frozenset((type(None), bool, int, float, str, torch.dtype))


def _is_unobserved() -> bool:
    """Whether the dispatcher would do no more for plain tensors than find the kernel."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
    )


def _is_plain(arg: Any) -> bool:
    """A tensor with memory and nothing special about it, or none at all."""
    kind = type(arg)
    if kind is Tensor or kind is Parameter:
        return not arg.is_meta
    if kind is list or kind is tuple:
        return all(map(_is_plain, arg))
    return not isinstance(arg, Tensor)


def differentiable(
    boundary: Boundary,
    save: Callable[[Any, tuple[Any, ...], Any], None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Give what `define` returned its gradient, once differentiable.

    Args:
        save: ``save(ctx, arguments, output)`` keeps on ``ctx`` what the backward pass needs, with
            ``ctx.save_for_backward`` for tensors, and marks outputs that carry no gradient.
        gradients: ``gradients(ctx, *grad_outputs)`` gives one gradient or None for each argument;
            ``ctx.needs_input_grad`` has one entry for each. A gradient that is not needed should
            not be computed. Where several outputs carry gradients, some may be None; those that
            carry none may be left out.

    Only tensors that are arguments themselves carry gradients, not those inside lists.
    """

    def run(ctx: Any, keyset: Any, args: tuple[Any, ...]) -> Any:
        ctx.set_materialize_grads(False)
        ctx.wish = registry.current()
        output = _below_autograd(boundary, keyset, args)
        if isinstance(output, list):  # a schema's Tensor[]: a Function knows tuples alone
            output = tuple(output)
        save(ctx, args, output)
        return output

    def differentiate(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if registry.current() is ctx.wish:
            return gradients(ctx, *grads)
        # On a GPU this runs in autograd's own thread, which knows nothing of the caller's context.
        with registry.under(ctx.wish):
            return gradients(ctx, *grads)

    class Plain(torch.autograd.Function):
        """The way past the dispatcher."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return run(ctx, None, args)

        @staticmethod
        @_once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return differentiate(ctx, grads)

    class PlainFirst(Plain):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return run(ctx, None, args)[0]

    class Dispatched(torch.autograd.Function):
        """Below the dispatcher, which hands over its keys as an argument of their own."""

        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            return run(ctx, keyset, args)

        @staticmethod
        @_once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return (None, *differentiate(_Arguments(ctx), grads))

    def autograd(keyset: Any, *args: Any) -> Any:
        # Function.apply makes a node even where nothing needs one; the no-grad prefix goes past it.
        if _needs_gradient(args):
            return Dispatched.apply(keyset, *args)
        return _below_autograd(boundary, keyset, args)

    name = boundary.overload._schema.name.partition("::")[2]
    for function in (Plain, PlainFirst, Dispatched):  # what a graph's node is called
        function.__name__ = f"{name}_function"
        function._backward_cls.__name__ = f"{name}_functionBackward"
    _library.impl(name, autograd, "Autograd", with_keyset=True)
    boundary.function, boundary.function_of_first = Plain, PlainFirst


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's once_differentiable, which costs nothing where no second derivative is asked for."""
    guarded = once_differentiable(backward)

    def run(ctx: Any, *grads: Tensor | None) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(arg, Tensor) and arg.requires_grad for arg in args
    )


class _Arguments:
    """The autograd context as the operator's own arguments see it, without the dispatch keys."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.needs_input_grad: tuple[bool, ...] = ctx.needs_input_grad[1:]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _below_autograd(boundary: Boundary, keyset: Any, args: tuple[Any, ...]) -> Any:
    """Run the kernel, whose operations autograd does not see; without dispatch keys, at once.

    Nor does its tracking of views: an output that is a reshaped intermediate result is a tensor of
    its own to the caller, who may write into it (peft does, where a batch mixes adapters).
    """
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_VIEW_TRACKING):
        if keyset is None:
            return boundary.kernel(*args)
        return boundary.redispatch(keyset & _BELOW_VIEW_TRACKING, *args)
