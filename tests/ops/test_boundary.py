"""The way past torch's dispatcher is taken only where nothing would notice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rewardprop_fast import ops
from rewardprop_fast.ops.geglu import op
from rewardprop_fast.ops.registration import Boundary
from tests.ops import oracle


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every call of the forward pass that goes through the dispatcher."""
    calls: list[Any] = []
    overload = op._FORWARD.overload

    def counted(*args: Any) -> Any:
        calls.append(args)
        return overload(*args)

    monkeypatch.setattr(op._FORWARD, "overload", counted)
    return calls


class Quiet(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class QuietFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    pass


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("wrap", [lambda x: x, Parameter])
def test_plain_tensors_go_straight_to_the_kernel(
    grad: bool, wrap: Callable[[Tensor], Tensor], dispatched: list[Any]
) -> None:
    x = wrap(torch.randn(2, 8)).requires_grad_(grad)
    y = ops.geglu(x)
    assert not dispatched
    assert y.requires_grad == grad
    assert torch.equal(y, torch.ops.rewardprop_fast.geglu(x))
    with torch.no_grad():
        assert not ops.geglu(x).requires_grad


@pytest.mark.parametrize(
    "listener",
    [Quiet, QuietFunctions, torch.profiler.profile, lambda: torch.autograd.profiler.profile()],
)
def test_modes_and_profilers_see_the_operator(
    listener: Callable[[], AbstractContextManager[Any]], dispatched: list[Any]
) -> None:
    with listener():
        ops.geglu(torch.randn(2, 8))
    assert len(dispatched) == 1


@pytest.mark.parametrize("make", [lambda x: x.as_subclass(Own), lambda x: x.to("meta")])
def test_special_tensors_go_through_the_dispatcher(
    make: Callable[[Tensor], Tensor], dispatched: list[Any]
) -> None:
    ops.geglu(make(torch.randn(2, 8)))
    assert len(dispatched) == 1


def test_transforms_of_functorch_are_seen(dispatched: list[Any]) -> None:
    x = torch.randn(3, 2, 8)
    found = torch.vmap(ops.geglu)(x)
    assert dispatched
    torch.testing.assert_close(found, ops.geglu(x))


@pytest.mark.parametrize("around", [nullcontext, Quiet])
@pytest.mark.parametrize("name", sorted(ops.OPERATORS))
def test_both_ways_give_the_same(name: str, around: Any) -> None:
    """Outputs, and that nothing of the kernel's own operations is recorded by autograd."""
    operator = ops.OPERATORS[name]
    torch.manual_seed(0)
    args = [
        torch.randn_like(a) if isinstance(a, Tensor) else a
        for a in operator.example("cpu", torch.float32)
    ]
    overload = getattr(torch.ops.rewardprop_fast, name).default
    with around():
        expected = overload(*args)
    found = _boundary(name)(*args)
    for one, other in zip(_flat(found), _flat(expected), strict=True):
        assert torch.equal(one, other)
        assert not one._is_view()


def _boundary(name: str) -> Boundary:
    module = import_module(f"rewardprop_fast.ops.{name}.op")
    (found,) = [
        value
        for value in vars(module).values()
        if isinstance(value, Boundary) and value.function is not None
    ]
    return found


def _flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for output in outputs for tensor in _flat(output)]


def test_a_result_that_is_a_view_inside_is_none_outside() -> None:
    x = torch.randn(2, 32, 5, 7).contiguous(memory_format=torch.channels_last)
    weight = oracle.laid_out(torch.randn(32, 32, 1, 1), "channels_last")
    assert not ops.frozen_conv2d(x, weight)._is_view()
    assert not ops.frozen_conv2d(x.requires_grad_(), weight)._is_view()
