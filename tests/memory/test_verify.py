"""What changed between two runs is found at its first operation, and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewardprop_fast.memory.recompute import RecomputeError, recompute
from rewardprop_fast.memory.verify import DivergenceError, fingerprint, traced


def test_a_fingerprint_is_of_dtype_shape_and_every_bit() -> None:
    x = torch.randn(3, 4)
    assert fingerprint(x) == fingerprint(x.clone())
    assert fingerprint(x.t()) == fingerprint(x.t().contiguous())  # strides do not count
    different = [x, x.view(4, 3), x.view(torch.int32), -x, x.double(), x[:2], torch.zeros(3, 4)]
    last_bit = x.clone()
    last_bit.view(torch.int32)[2, 3] ^= 1
    zero = torch.zeros(3, 4)
    zero[0, 0] = -0.0
    different += [last_bit, zero]
    assert len({fingerprint(tensor) for tensor in different}) == len(different)
    for odd in (torch.tensor(1.0), torch.empty(0, 3), torch.tensor([True]), x.bfloat16()):
        assert fingerprint(odd) == fingerprint(odd.clone())


def test_nan_is_equal_to_itself() -> None:
    x = torch.tensor([float("nan"), 1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(recompute(lambda x: x.exp().sin(), x, verify=True).sum(), x)
    assert gradient.isnan().tolist() == [True, False]


def operations() -> Any:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def test_changed_weights_are_found_at_the_first_operation_that_uses_them() -> None:
    model, x = operations(), torch.randn(2, 4, requires_grad=True)
    with traced() as trace:
        model(x)
    names = [name for name, _ in trace.operations]
    assert names == ["aten.addmm", "aten.tanh", "aten.addmm", "aten.tanh", "aten.addmm"]
    y = recompute(model, x, name="unet.mid_block", verify=True)
    with torch.no_grad():
        model[2].bias.add_(1e-3)
    with pytest.raises(DivergenceError) as error:
        y.sum().backward()
    assert str(error.value).startswith(
        "The segment 'unet.mid_block' computed other values in aten.addmm (operation 3 of 5). Its "
        "inputs, weights or settings have changed"
    )
    assert isinstance(error.value, RecomputeError)


def test_without_verify_changed_weights_pass_unseen() -> None:
    """What verify is for."""
    model, x = operations(), torch.randn(2, 4, requires_grad=True)
    y = recompute(model, x)
    with torch.no_grad():
        model[2].weight.add_(1)
    y.sum().backward()


def test_another_operation_is_named_beside_the_one_that_was_expected() -> None:
    switch = [True]

    def function(x: Tensor) -> Tensor:
        return (x.exp() if switch[0] else x.sinh()).sin()

    x = torch.randn(3, requires_grad=True)
    y = recompute(function, x, verify=True)
    switch[0] = False
    with pytest.raises(DivergenceError, match=r"ran aten.sinh where it first ran aten.exp \(oper"):
        y.sum().backward()


def test_more_operations_than_before_are_found() -> None:
    rounds = [1]

    def function(x: Tensor) -> Tensor:
        for _ in range(rounds[0]):
            x = x.neg()
        return x if rounds[0] > 1 else x.exp()

    x = torch.randn(3, requires_grad=True)
    y = recompute(function, x, verify=True)
    rounds[0] = 3
    with pytest.raises(DivergenceError, match=r"ran aten.neg where it first ran aten.exp"):
        y.sum().backward()
    y = recompute(lambda x: x.exp(), x, verify=True)
    y.grad_fn._saved_result  # noqa: B018  # a look from outside does no harm
    y.sum().backward()


def test_a_function_that_depends_on_what_is_not_its_input() -> None:
    calls = [0]

    def function(x: Tensor) -> Tensor:
        calls[0] += 1
        return x.exp() * (1 + 1e-6 * calls[0]) + x.sin()

    x = torch.randn(3, requires_grad=True)
    y = recompute(function, x, name="odd", verify=True)
    with pytest.raises(DivergenceError, match=r"'odd' computed other values in aten.mul"):
        y.sum().backward()


def test_random_numbers_are_the_same_and_new_memory_does_not_count() -> None:
    def function(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5).exp() * torch.empty_like(x).normal_() * torch.empty(40).uniform_()

    x = torch.randn(40, requires_grad=True)
    recompute(function, x, verify=True).sum().backward()
    y = recompute(function, x, verify=True, random=False)
    with pytest.raises(DivergenceError, match=r"computed other values in aten.bernoulli_"):
        y.sum().backward()


def test_an_inner_call_is_named_not_the_one_around_it() -> None:
    model, x = operations(), torch.randn(2, 4, requires_grad=True)

    def outer(x: Tensor) -> Tensor:
        return recompute(model[:3], x.sin(), name="inner", verify=True).exp()

    y = recompute(outer, x, name="outer", verify=True)
    loss = y.sum()
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert gradient.abs().max() > 0
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(
        DivergenceError, match=r"'outer' computed .* in aten.addmm \(operation 2 of 5\)"
    ):
        torch.autograd.grad(loss, x)
    y = recompute(model[:3], x, name="inner", verify=True)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(DivergenceError, match=r"The segment 'inner'"):
        y.sum().backward()


def test_two_that_watch_do_not_see_each_other() -> None:
    x = torch.randn(3, 4)
    with traced() as outer, traced() as inner:
        x.t().exp()  # in strides that hashing has to copy
    assert [name for name, _ in outer.operations] == ["aten.exp"]
    assert outer.operations == inner.operations
