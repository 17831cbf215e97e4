"""One call of an operator: its arguments, its rivals, and what it must compute and move.

One description serves the correctness checks on a device, the timings and the static model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Cost:
    """Of one pass: multiply-adds count as two FLOPs; bytes if each tensor is moved once.

    ``unit_bytes`` is the u of the byte floors: one activation tensor read or written once.
    """

    flops: float
    floor_bytes: float
    unit_bytes: float

    @property
    def floor_units(self) -> float:
        """The floor in u."""
        return self.floor_bytes / self.unit_bytes if self.unit_bytes else 0.0


@dataclass(frozen=True)
class Case:
    """One call of an operator's public function.

    Attributes:
        make: ``make(device, dtype)`` gives the arguments by name, random from torch's generator,
            for a network that computes in ``dtype``.
        call: the public function, called with these arguments.
        leaves: the arguments that carry gradients.
        baselines: the same result from other libraries, called with the same arguments; "eager" is
            plain PyTorch, works in float64 too, and is what correctness is judged by.
        cost: ``cost(dtype)`` gives that of the forward pass and of the backward pass.
        count: how often the network calls it.
        dtypes: what the operator is used in.
    """

    operator: str
    name: str
    make: Callable[[str, torch.dtype], Arguments]
    call: Function
    leaves: tuple[str, ...]
    baselines: Mapping[str, Function]
    cost: Callable[[torch.dtype], tuple[Cost, Cost]]
    count: int = 1
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def tensors(outputs: Any) -> tuple[Tensor, ...]:
    """An operator's outputs as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def with_leaves(case: Case, arguments: Arguments) -> Arguments:
    """The arguments with fresh leaves that require gradients; the values are shared."""
    return {
        name: value.detach().requires_grad_() if name in case.leaves else value
        for name, value in arguments.items()
    }


def converted(arguments: Arguments, dtype: torch.dtype, device: str | None = None) -> Arguments:
    """The same values with every floating tensor in ``dtype``, strides kept."""
    return {
        name: value.to(device=device, dtype=dtype)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def forward_and_backward(
    case: Case, function: Function, arguments: Arguments, grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """The outputs and the gradients of the leaves, in the order of `Case.leaves`."""
    arguments = with_leaves(case, arguments)
    outputs = tensors(function(**arguments))
    if case.leaves:
        grads = tuple(grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True))
        torch.autograd.backward(outputs, grads)
    gradients = tuple(arguments[name].grad for name in case.leaves)
    return (*(output.detach() for output in outputs), *gradients)
