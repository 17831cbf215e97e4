"""`frozen_linear` against PyTorch's own linear layer and 1x1 convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewardprop_fast import ops
from rewardprop_fast.ops import frozen_linear
from tests.ops import oracle

OP = torch.ops.rewardprop_fast.frozen_linear.default
OP_BACKWARD = torch.ops.rewardprop_fast.frozen_linear_backward.default

BACKENDS = ("native", "reference")


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    k=st.integers(1, 67),
    n=st.integers(1, 67),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    backend=st.sampled_from(BACKENDS),
    layouts=st.tuples(*[st.sampled_from(oracle.LAYOUTS)] * 3),
    with_bias=st.booleans(),
)
def test_is_pytorchs_linear(
    rows: tuple[int, ...],
    k: int,
    n: int,
    dtype: torch.dtype,
    backend: str,
    layouts: tuple[str, ...],
    with_bias: bool,
) -> None:
    x, weight, grad = (
        oracle.laid_out(torch.randn(shape).to(dtype), layout)
        if len(shape) > 1
        else torch.randn(shape).to(dtype)
        for shape, layout in zip(((*rows, k), (n, k), (*rows, n)), layouts, strict=True)
    )
    bias = torch.randn(n).to(dtype) if with_bias else None

    def exactly(x: Tensor) -> Tensor:
        return F.linear(x, weight.double(), None if bias is None else bias.double())

    def of_sizes(x: Tensor) -> Tensor:
        return F.linear(x, weight.double().abs(), None if bias is None else bias.double().abs())

    with ops.backend(backend, strict=True), oracle.poisoned():
        ours = oracle.output_and_gradients(lambda x: frozen_linear(x, weight, bias), [x], grad)
    torchs = oracle.output_and_gradients(lambda x: F.linear(x, weight, bias), [x], grad)
    exact = oracle.output_and_gradients(exactly, [x.double()], grad.double())
    sizes = oracle.output_and_gradients(of_sizes, [x.double().abs()], grad.double().abs())
    for own, theirs, truth, terms in zip(ours, torchs, exact, sizes, strict=True):
        assert truth is not None
        assert terms is not None
        # Few numbers may cancel, and PyTorch be exact by luck: then the terms' size is what counts.
        unit = torch.finfo(dtype).eps * float(terms.norm() / truth.norm().clamp_min(1e-300))
        oracle.assert_as_exact_as_torch([own], [theirs], [truth], unit=unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_is_pytorchs_pointwise_convolution_in_its_memory_format(
    layout: str, dtype: torch.dtype
) -> None:
    x = oracle.laid_out(torch.randn(2, 12, 5, 3).to(dtype), layout)
    weight, bias = torch.randn(10, 12, 1, 1).to(dtype), torch.randn(10).to(dtype)
    grad = oracle.laid_out(torch.randn(2, 10, 5, 3).to(dtype), layout)
    ours = oracle.output_and_gradients(lambda x: frozen_linear(x, weight, bias), [x], grad)
    torchs = oracle.output_and_gradients(lambda x: F.conv2d(x, weight, bias), [x], grad)
    exact = oracle.output_and_gradients(
        lambda x: F.conv2d(x, weight.double(), bias.double()), [x.double()], grad.double()
    )
    oracle.assert_as_exact_as_torch(ours, torchs, exact)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert ours[0] is not None
    assert ours[0].is_contiguous(memory_format=form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "n"), [(1280, 640), (5120, 96), (96, 5120)])
def test_sums_of_many_columns(k: int, n: int, backend: str, dtype: torch.dtype) -> None:
    """As wide as the networks': their rounding errors are those of PyTorch's own sums."""
    if dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX512":
        pytest.skip("oneDNN's float32 sums have not been measured with AVX-512")
    x, grad = torch.randn(65, k).to(dtype), torch.randn(65, n).to(dtype)
    weight, bias = (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype)
    with ops.backend(backend, strict=True):
        ours = oracle.output_and_gradients(lambda x: frozen_linear(x, weight, bias), [x], grad)
    torchs = oracle.output_and_gradients(lambda x: F.linear(x, weight, bias), [x], grad)
    exact = oracle.output_and_gradients(
        lambda x: F.linear(x, weight.double(), bias.double()), [x.double()], grad.double()
    )
    oracle.assert_as_exact_as_torch(ours, torchs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows_nan_and_infinities(backend: str, dtype: torch.dtype) -> None:
    """They reach the rows that hold one, and no other."""
    x, weight = torch.randn(2**16 + 1, 5).to(dtype), torch.randn(3, 5).to(dtype)
    grad = torch.randn(2**16 + 1, 3).to(dtype)
    x[1, 2], x[2**16, 0], x[7, 1] = float("nan"), float("inf"), -float("inf")
    grad[3, 1], grad[2**16 - 1, 0] = float("inf"), float("nan")
    with ops.backend(backend, strict=True), oracle.poisoned():
        ours = oracle.output_and_gradients(lambda x: frozen_linear(x, weight, None), [x], grad)
    exact = oracle.output_and_gradients(
        lambda x: F.linear(x, weight.double()), [x.double()], grad.double()
    )
    for own, truth in zip(ours, exact, strict=True):
        assert own is not None
        assert truth is not None
        assert torch.equal(own.isnan(), truth.isnan())
        assert torch.equal(own.isinf(), truth.isinf())
        torch.testing.assert_close(own, truth.to(dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_same_a_hundred_times(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((131, 67), (53, 67), (53,)))
    grad = torch.randn(131, 53).to(dtype)

    def run() -> list[Tensor | None]:
        return oracle.output_and_gradients(lambda x: frozen_linear(x, weight, bias), [x], grad)

    with ops.backend(backend, strict=True):
        first = run()
        for _ in range(100):
            for again, before in zip(run(), first, strict=True):
                assert again is not None
                assert before is not None
                assert torch.equal(again, before)


@pytest.mark.parametrize("convolution", [False, True])
def test_keeps_the_weight_and_nothing_else(convolution: bool) -> None:
    shape, tail = ((2, 12, 5, 3), (1, 1)) if convolution else ((2, 15, 12), ())
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(10, 12, *tail)
    (kept,) = oracle.kept_for_backward(lambda: frozen_linear(x, weight, None))
    assert kept.data_ptr() == weight.data_ptr()


def test_gradcheck_in_float64() -> None:
    x, weight = torch.randn(2, 3, 5).double().requires_grad_(), torch.randn(4, 5).double()
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, weight, None), [x])


@pytest.mark.parametrize("layout", ["contiguous", "strided", "expanded"])
def test_opcheck(layout: str) -> None:
    x = oracle.laid_out(torch.randn(2, 3, 5), layout)
    weight, bias = torch.randn(4, 5), torch.randn(4)
    torch.library.opcheck(OP, (x.requires_grad_(), weight, bias))
    torch.library.opcheck(OP, (torch.randn(2, 5, 3).mT.requires_grad_(), weight, None))
    torch.library.opcheck(OP_BACKWARD, (oracle.laid_out(torch.randn(2, 3, 4), layout), weight))


def test_traces_into_one_graph_with_the_same_gradient() -> None:
    x, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(5, 5)

    def two_layers(x: Tensor) -> Tensor:
        return frozen_linear(frozen_linear(x, weight, None).sin(), weight, weight[0]).square()

    eager = two_layers(x)
    traced = torch.compile(two_layers, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(traced, eager)
    torch.testing.assert_close(
        torch.autograd.grad(traced.sum(), x), torch.autograd.grad(eager.sum(), x)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 11)}, r"x has shape \(2, 11\).*it must be \(\.\.\., 12\)"),
        ({1: torch.zeros(10, 12, requires_grad=True)}, r"weight requires a gradient.*linear"),
        ({1: torch.zeros(10, 12, 1, 1)}, r"x has shape .* it must be \(B, 12, H, W\)"),
        ({1: torch.zeros(10, 12).half()}, r"weight has dtype torch.float16; it must be that of x"),
        ({2: torch.zeros(10, requires_grad=True)}, r"bias requires a gradient"),
        ({2: torch.zeros(10, device="meta")}, r"bias is on meta, x on cpu"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[int, Tensor], message: str) -> None:
    args: list[Any] = [torch.zeros(2, 12), torch.zeros(10, 12), torch.zeros(10)]
    for position, value in change.items():
        args[position] = value
    with pytest.raises(ValueError, match=message):
        frozen_linear(*args)


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.zeros(2, 11), r"grad is \(2, 11\) .* it must be \(2, 10\)"),
        (torch.zeros(2, 10).bfloat16(), r"grad is .* torch.bfloat16 .* torch.float32"),
        (torch.zeros(2, 10, device="meta"), r"grad is .* on meta; .* on cpu"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused(grad: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OP_BACKWARD(grad, torch.zeros(10, 12))
