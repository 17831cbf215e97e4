"""The operators' multiply-adds against those their plain PyTorch specification really does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rewardprop_fast.ops import OPERATORS, attention, geglu, lora_linears
from rewardprop_fast.ops.attention import reference as attention_reference
from rewardprop_fast.ops.flops import FLOP_FORMULAS
from rewardprop_fast.ops.frozen_linear import reference as linear_reference
from rewardprop_fast.ops.lora_linear import reference as lora_reference

OPS = torch.ops.rewardprop_fast
B, H, LQ, LK, D = 2, 3, 7, 5, 8
M, K, N, RANKS = (4, 3), 10, (6, 14), (2, 5)


def counted(function: Callable[..., Any], *args: Any) -> int:
    """By PyTorch, operation by operation, without the formulas under test."""
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def claimed(operator: Any, *args: Any) -> int:
    """By the formula, as FlopCounterMode applies it to the operator itself."""
    with FlopCounterMode(display=False, custom_mapping=dict(FLOP_FORMULAS)) as counter:
        operator(*args)
    return counter.get_total_flops()


def test_every_operator_has_a_formula_for_each_pass() -> None:
    expected = {getattr(OPS, name + part) for name in OPERATORS for part in ("", "_backward")}
    assert set(FLOP_FORMULAS) == expected


def test_linear() -> None:
    x, weight, grad = torch.randn(*M, K), torch.randn(N[0], K), torch.randn(*M, N[0])
    assert claimed(OPS.frozen_linear, x, weight, None) == 2 * 12 * 10 * 6
    assert counted(linear_reference.forward, x, weight, None) == 2 * 12 * 10 * 6
    found = claimed(OPS.frozen_linear_backward, grad, weight)
    assert found == counted(linear_reference.backward, grad, weight) == 2 * 12 * 10 * 6


def lora_arguments() -> tuple[Any, ...]:
    weights = [torch.randn(n, K) for n in N]
    lora_b = torch.randn(sum(n * r for n, r in zip(N, RANKS, strict=True)))
    adapters = (torch.randn(sum(RANKS), K), lora_b, list(RANKS), [1.0, 0.5])
    return torch.randn(*M, K), weights, [None, torch.randn(N[1])], *adapters


def test_lora_linear() -> None:
    args = lora_arguments()
    assert claimed(OPS.lora_linear, *args) == counted(lora_reference.forward, *args) > 0


@pytest.mark.parametrize("needed", list(product((False, True), repeat=3))[1:])
@pytest.mark.parametrize("used", [(True, True), (False, True), (True, False)])
def test_lora_linear_backward(needed: tuple[bool, ...], used: tuple[bool, ...]) -> None:
    x, weights, _, lora_a, lora_b, ranks, scales = lora_arguments()
    grads = [torch.randn(*M, n) if there else None for n, there in zip(N, used, strict=True)]
    s = torch.randn(12, sum(RANKS))
    args = (grads, weights, x, s, lora_a, lora_b, ranks, scales, list(x.shape), list(needed))
    exact = 0
    for n, rank, there in zip(N, RANKS, used, strict=True):
        dx, da, db = needed
        exact += there * 2 * 12 * (n * K * dx + n * rank * (dx or da) + n * rank * db)
        exact += there * 2 * 12 * rank * K * (dx + da)
    assert claimed(OPS.lora_linear_backward, *args) == exact
    # Of a layer that is not used, and of dS where only dB is needed, the specification does more.
    if all(used) and any(needed[:2]):
        assert counted(lora_reference.backward, *args) == exact


def heads(length: int) -> torch.Tensor:
    return torch.randn(B, H, length, D)


def test_attention() -> None:
    args = (heads(LQ), heads(LK), heads(LK), 0.5)
    found = claimed(OPS.attention, *args)
    assert found == counted(attention_reference.forward, *args) == 2 * 2 * 6 * 7 * 5 * 8


@pytest.mark.parametrize("needed", list(product((False, True), repeat=3))[1:])
def test_attention_backward(needed: tuple[bool, bool, bool]) -> None:
    q, k, v = heads(LQ), heads(LK), heads(LK)
    out, lse = attention_reference.forward(q, k, v, 0.5)
    args = (torch.randn_like(out), q, k, v, out, lse, 0.5, needed)
    found = claimed(OPS.attention_backward, *args)
    assert found == counted(attention_reference.backward, *args)
    if all(needed):
        assert found == 5 * 2 * 6 * 7 * 5 * 8


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "groups"),
    [
        ((2, 8, 9, 6), (3, 3), 1, 1, 1),
        ((2, 8, 9, 6), (3, 3), 2, 1, 4),
        ((1, 6, 5, 7), (1, 3), 1, 0, 2),
    ],
)
def test_convolution(
    shape: tuple[int, ...], kernel: tuple[int, int], stride: int, padding: int, groups: int
) -> None:
    x = torch.randn(shape)
    weight = torch.randn(12, shape[1] // groups, *kernel)
    geometry = ([stride] * 2, [padding] * 2, [1, 1], groups)
    y = torch.nn.functional.conv2d(x, weight, None, *geometry)
    exact = 2 * y.numel() * weight[0].numel()  # each output: every tap of its channels
    assert claimed(OPS.frozen_conv2d, x, weight, None, *geometry) == exact
    args = (torch.randn_like(y), weight, list(shape), *geometry, False)
    assert claimed(OPS.frozen_conv2d_backward, *args) == exact


def test_upsampling_convolution_counts_the_large_image() -> None:
    x, weight = torch.randn(2, 4, 5, 3), torch.randn(6, 4, 3, 3)
    exact = 2 * (2 * 6 * 10 * 6) * (4 * 9)
    assert claimed(OPS.frozen_upsample_conv2d, x, weight, None) == exact
    grad = torch.randn(2, 6, 10, 6)
    assert claimed(OPS.frozen_upsample_conv2d_backward, grad, weight, False) == exact


def test_elements_count_nothing() -> None:
    assert claimed(geglu, torch.randn(4, 6)) == 0
    args = (torch.randn(2, 4, 3), None, None, 2, 1e-5, True)
    assert claimed(OPS.group_norm_silu, *args) == 0


def test_the_public_functions_and_autograd_are_counted_too() -> None:
    x, weights, biases, *_ = lora_arguments()
    lora_as = [torch.randn(r, K, requires_grad=True) for r in RANKS]
    lora_bs = [torch.randn(n, r, requires_grad=True) for n, r in zip(N, RANKS, strict=True)]
    q, k, v = (heads(length).requires_grad_() for length in (LQ, LK, LK))
    with FlopCounterMode(display=False, custom_mapping=dict(FLOP_FORMULAS)) as counter:
        outputs = lora_linears(x, weights, biases, lora_as, lora_bs, [1.0, 1.0])
        (sum(y.sum() for y in outputs) + attention(q, k, v).sum()).backward()
    forward = 2 * 12 * (K * sum(N) + K * sum(RANKS) + 6 * 2 + 14 * 5)
    backward = 2 * 12 * (2 * (6 * 2 + 14 * 5) + K * sum(RANKS))  # x needs no gradient
    assert counter.get_total_flops() == forward + backward + 7 * 2 * 6 * 7 * 5 * 8
