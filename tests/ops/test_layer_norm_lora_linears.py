"""LoRA layers behind a layer normalisation: bitwise the two by themselves, and less kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from rewardprop_fast import ops
from rewardprop_fast.memory.recompute import recompute
from rewardprop_fast.ops import registry
from tests.ops import oracle

EPS = 1e-5
Settings = dict[str, Any]


def settings(
    dtype: torch.dtype = torch.float32, layers: int = 3, affine: bool = True, rows: int = 10
) -> Settings:
    """Arguments: x (2, rows, 16), layers of widths 16, 8, 24 and ranks 2, 1, 3."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(of)

    master = dtype if dtype == torch.float64 else torch.float32
    sizes = [(16, 2), (8, 1), (24, 3)][:layers]
    return {
        "x": (3 + 2 * normal(2, rows, 16)).requires_grad_(),
        "norm_weight": normal(16) if affine else None,
        "norm_bias": normal(16) if affine else None,
        "weights": [normal(n, 16, scale=0.3) for n, _ in sizes],
        "biases": [normal(n) if n == 8 else None for n, _ in sizes],
        "lora_as": [normal(r, 16, of=master).requires_grad_() for _, r in sizes],
        "lora_bs": [normal(n, r, of=master).requires_grad_() for n, r in sizes],
        "scales": [0.5, 2.0, 1.0][:layers],
    }


def ours(given: Settings) -> tuple[Tensor, ...]:
    return ops.layer_norm_lora_linears(eps=EPS, **given)


def plainly(given: Settings) -> tuple[Tensor, ...]:
    rest = {key: value for key, value in given.items() if not key.startswith("norm_")}
    x = F.layer_norm(rest.pop("x"), (16,), given["norm_weight"], given["norm_bias"], EPS)
    return ops.lora_linears(x, **rest)


def leaves(given: Settings) -> list[Tensor]:
    return [t for t in (given["x"], *given["lora_as"], *given["lora_bs"]) if t.requires_grad]


def run(function: Callable[[Settings], tuple[Tensor, ...]], given: Settings) -> list[Tensor]:
    outputs = function(given)
    loss = sum((output.float().sin() * (i + 1)).sum() for i, output in enumerate(outputs))
    return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, leaves(given))]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert all(map(torch.equal, found, expected))
    assert all(t.abs().max() > 0 for t in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("layers", "affine"), [(1, True), (3, True), (2, False)])
def test_values_and_gradients_are_bitwise_those_of_the_two(
    dtype: torch.dtype, layers: int, affine: bool
) -> None:
    given = settings(dtype, layers, affine)
    assert_equal(run(ours, given), run(plainly, given))
    assert_equal(run(ours, given), run(ours, given))


def test_other_strides() -> None:
    given = settings()
    base = torch.randn(10, 16, 4)
    given["x"] = base.permute(2, 0, 1)[::2].detach().requires_grad_()
    assert_equal(run(ours, given), run(plainly, given))


@pytest.mark.parametrize("needed", [("x",), ("lora_as",), ("lora_bs",), ("x", "lora_bs"), ()])
def test_only_the_gradients_that_are_needed(needed: tuple[str, ...]) -> None:
    given = settings()
    for name in ("x", "lora_as", "lora_bs"):
        tensors = [given[name]] if name == "x" else given[name]
        for tensor in tensors:
            tensor.requires_grad_(name in needed)
    if needed:
        assert_equal(run(ours, given), run(plainly, given))
    else:
        assert not any(output.requires_grad for output in ours(given))
    sizes = {id(t.untyped_storage()): t for t in oracle.kept_for_backward(lambda: ours(given))}
    rows = [t for t in sizes.values() if t.shape == given["x"].shape]
    assert len(rows) <= ("x" in needed or "lora_as" in needed)


def test_an_output_that_is_not_used() -> None:
    given = settings()
    found, expected = (
        torch.autograd.grad(function(given)[1].sum(), leaves(given), allow_unused=True)
        for function in (ours, plainly)
    )
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_x_is_kept_once_and_its_normalisation_is_not() -> None:
    given = settings(layers=3, rows=64)

    def kept(function: Callable[..., Any]) -> list[Tensor]:
        found = oracle.kept_for_backward(lambda: function(given))
        addresses: dict[int, Tensor] = {}
        for tensor in found:
            addresses.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return [t for t in addresses.values() if t.shape == given["x"].shape]

    (only,) = kept(ours)
    assert only.data_ptr() == given["x"].data_ptr()
    assert len(kept(plainly)) == 2


def test_twice_backward_and_no_second_derivative() -> None:
    given = settings()
    outputs = ours(given)
    loss = sum(output.sin().sum() for output in outputs)
    first = torch.autograd.grad(loss, leaves(given), retain_graph=True)
    assert_equal(list(torch.autograd.grad(loss, leaves(given), retain_graph=True)), list(first))
    (gradient,) = torch.autograd.grad(loss, given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_is_kept_goes_through_the_hooks_around_it() -> None:
    given = settings()
    expected = run(plainly, given)
    assert_equal(run(lambda g: recompute(ours, g, verify=True), given), expected)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = ours(given)
    loss = sum((output.sin() * (i + 1)).sum() for i, output in enumerate(outputs))
    assert_equal(list(torch.autograd.grad(loss, leaves(given))), expected[3:])
    assert sum(t.data_ptr() == given["x"].data_ptr() for t in packed) == 1


def test_the_backend_is_that_of_the_call() -> None:
    given = settings()
    with ops.backend("reference"):
        expected = run(plainly, given)
        outputs = ours(given)
    wishes: list[str] = []
    reference = ops.OPERATORS["lora_linear"].implementations[-1]
    backward = reference.backward

    def spy(*args: Any) -> Any:
        wishes.append(registry.current().name)
        return backward(*args)

    object.__setattr__(reference, "backward", spy)
    try:
        loss = sum((output.sin() * (i + 1)).sum() for i, output in enumerate(outputs))
        assert_equal(list(torch.autograd.grad(loss, leaves(given))), expected[3:])
    finally:
        object.__setattr__(reference, "backward", backward)
    assert wishes == ["reference"]


def test_in_one_graph() -> None:
    given = settings(layers=2)
    expected = run(plainly, given)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(run(compiled, given), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_on_fake_tensors() -> None:
    with FakeTensorMode():
        found = run(ours, settings(torch.bfloat16))
    expected = run(plainly, settings(torch.bfloat16))
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]


def test_what_does_not_fit_is_said() -> None:
    given = settings()
    given["norm_weight"].requires_grad_()
    with pytest.raises(ValueError, match="normalisation's weight or bias requires a gradient"):
        ours(given)
    with torch.no_grad():
        ours(given)
    given = settings(layers=1)
    given["weights"] = [given["weights"][0][:, :, None, None]]
    with pytest.raises(ValueError, match="takes linear layers, with weights"):
        ours(given)
    given = settings()
    given["scales"] = [1.0]
    with pytest.raises(ValueError, match="one of each for every layer"):
        ours(given)
