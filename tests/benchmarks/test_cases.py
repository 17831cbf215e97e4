"""The cases that checks, timings and the static model go through."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases
from benchmarks.cases import (
    attention,
    frozen,
    geglu,
    group_norm_silu,
    guided_ddim_step,
    lora_linear,
    networks,
)
from benchmarks.cases.protocol import Case, converted, forward_and_backward, tensors
from rewardprop_fast import ops

SUITES = (attention, frozen, geglu, group_norm_silu, guided_ddim_step, lora_linear)


def small() -> list[Case]:
    """One of each operator, whether it is there or not."""
    return [case for suite in SUITES for case in suite.checks()[:3]]


def test_every_operator_has_cases_and_layers_of_a_network() -> None:
    names = {case.operator for case in cases.check_cases()}
    assert names == set(ops.OPERATORS)
    used = {case.operator for case in cases.layer_cases("sd15", 512, 2)}
    assert used == set(ops.OPERATORS)


def test_the_layers_are_those_of_the_networks() -> None:
    found = networks.layers("sd15", 512, 2)
    assert found[networks.AttentionLayer(2, 8, 4096, 4096, 40)] == 5
    assert found[networks.AttentionLayer(2, 8, 4096, 77, 40)] == 5
    assert found[networks.GroupNormLayer((2, 320, 64, 64), 32, 1e-5, True)] == 8
    assert found[networks.GegluLayer((2, 4096, 2560))] == 5
    assert found[networks.ConvLayer((2, 2560, 8, 8), 1280, (3, 3), (1, 1), (1, 1))] == 3
    # Twelve transformer blocks and the middle one, two attentions each, four projections each.
    adapted = [n for layer, n in found.items() if getattr(layer, "adapted", False)]
    assert sum(adapted) == 16 * 2 * 4


@pytest.mark.parametrize("case", small(), ids=lambda case: f"{case.operator} {case.name}")
def test_baselines_agree_in_float64(case: Case) -> None:
    """Each baseline computes the same thing; xformers needs a GPU."""
    arguments = case.make("cpu", torch.float64)
    grads = tuple(torch.randn_like(y) for y in tensors(case.baselines["eager"](**arguments)))
    expected = forward_and_backward(case, case.baselines["eager"], arguments, grads)
    for name, baseline in case.baselines.items():
        if name != "xformers":
            found = forward_and_backward(case, baseline, arguments, grads)
            for own, other in zip(found, expected, strict=True):
                torch.testing.assert_close(own, other)


@pytest.mark.parametrize(
    "case", cases.check_cases(), ids=lambda case: f"{case.operator} {case.name}"
)
def test_the_operator_computes_what_its_baseline_does(case: Case) -> None:
    """In float64, where only the reference is legal: the cases fit the operators' signatures."""
    arguments = case.make("cpu", torch.float64)
    grads = tuple(torch.randn_like(y) for y in tensors(case.baselines["eager"](**arguments)))
    expected = forward_and_backward(case, case.baselines["eager"], arguments, grads)
    found = forward_and_backward(case, case.call, arguments, grads)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)


def test_master_weights_stay_float32_and_layouts_stay() -> None:
    arguments = lora_linear.checks()[0].make("meta", torch.bfloat16)
    assert arguments["lora_a"].dtype == torch.float32
    assert arguments["weight"].dtype == torch.bfloat16
    x = group_norm_silu.checks()[0].make("cpu", torch.bfloat16)["x"]
    assert x.is_contiguous(memory_format=torch.channels_last)
    exact = converted({"x": x}, torch.float64)["x"]
    assert exact.stride() == x.stride()
    assert torch.equal(exact, x.double())


@pytest.mark.parametrize(
    ("suite", "forward", "backward"),
    [(group_norm_silu, 2, 3), (geglu, 3, 5)],
    ids=lambda value: getattr(value, "OPERATOR", value),
)
def test_floors_in_units(suite: object, forward: float, backward: float) -> None:
    large = [
        case
        for layer, count in networks.layers("sdxl", 1024, 2).items()
        for case in suite.of_layer(layer, count)  # type: ignore[attr-defined]
    ]
    assert large
    for case in large:
        costs = case.cost(torch.bfloat16)
        assert costs[0].floor_units == pytest.approx(forward, rel=0.01)
        assert costs[1].floor_units == pytest.approx(backward, rel=0.01)


def test_floors_of_products() -> None:
    """A large square lora_linear: 2u and 3u, the weights and S apart."""
    layer = networks.LinearLayer(8192, 640, 640, True, True)
    forward, backward = lora_linear.case(layer, 16).cost(torch.bfloat16)
    assert forward.floor_units == pytest.approx(2, rel=0.08)
    assert backward.floor_units == pytest.approx(3, rel=0.08)
    assert forward.flops == 2 * 8192 * 640 * 640 + 2 * 8192 * 16 * (640 + 640)
    own = attention.case(networks.AttentionLayer(2, 10, 4096, 4096, 64))
    forward, backward = own.cost(torch.bfloat16)
    assert forward.floor_units == pytest.approx(4, rel=0.02)
    assert backward.floor_units == pytest.approx(8, rel=0.02)
    assert backward.flops == 2.5 * forward.flops
