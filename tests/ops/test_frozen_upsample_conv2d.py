"""The operator against interpolate, conv2d and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewardprop_fast import ops
from rewardprop_fast.ops import drop_packs, frozen_upsample_conv2d, packed_bytes
from rewardprop_fast.ops.frozen_upsample_conv2d import native
from tests.ops import oracle

OP = torch.ops.rewardprop_fast.frozen_upsample_conv2d.default
OP_BACKWARD = torch.ops.rewardprop_fast.frozen_upsample_conv2d_backward.default

needs_onednn = pytest.mark.skipif(
    native.onednn.why_not_convolution(torch.float32) is not None,
    reason="PyTorch has no oneDNN here",
)
HAS_BFLOAT16 = native.onednn.why_not_convolution(torch.bfloat16) is None
needs_bfloat16 = pytest.mark.skipif(
    not HAS_BFLOAT16, reason="PyTorch has no oneDNN with bfloat16 here"
)
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]


def inputs(
    x_shape: tuple[int, ...] = (2, 32, 5, 7),
    outputs: int = 48,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    weight = torch.randn(outputs, x_shape[1], 3, 3) / (9 * x_shape[1]) ** 0.5
    x = oracle.laid_out(torch.randn(x_shape).to(dtype), layout)
    return x, oracle.laid_out(weight.to(dtype), layout), torch.randn(outputs).to(dtype)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def both(function: Any, x: Tensor, rest: tuple[Any, ...], grad: Tensor) -> list[Tensor]:
    """y and the gradient of x."""
    x = x.detach().requires_grad_()
    y = function(x, *rest)
    return [y.detach(), *torch.autograd.grad(y, x, grad)]


def ours(backend: str, x: Tensor, rest: tuple[Any, ...], grad: Tensor) -> list[Tensor]:
    with ops.backend(backend, strict=True):
        return both(frozen_upsample_conv2d, x, rest, grad)


@settings(max_examples=40, deadline=None)
@given(
    backend=st.sampled_from(["native", "reference"]),
    batch=st.integers(1, 3),
    channels=st.tuples(st.integers(16, 70), st.integers(16, 70)),
    size=st.tuples(st.integers(1, 11), st.integers(1, 13)),
    layouts=st.tuples(*[st.sampled_from(oracle.LAYOUTS)] * 2),
    with_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, *[torch.bfloat16] * HAS_BFLOAT16]),
)
@needs_onednn
def test_is_no_less_exact_than_interpolate_and_conv2d(
    backend: str,
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    layouts: tuple[str, str],
    with_bias: bool,
    dtype: torch.dtype,
) -> None:
    x, weight, bias = inputs((batch, channels[0], *size), channels[1], dtype)
    rest = (weight, bias if with_bias else None)
    grad = torch.randn_like(plain(x, *rest))
    x, grad = oracle.laid_out(x, layouts[0]), oracle.laid_out(grad, layouts[1])
    exact = both(plain, x.double(), tuple(r if r is None else r.double() for r in rest), grad)
    with oracle.poisoned():
        found = ours(backend, x, rest, grad)
    oracle.assert_as_exact_as_torch(found, both(plain, x, rest, grad), exact)
    assert all(map(torch.equal, found, ours(backend, x, rest, grad)))


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_few_pixels_need_no_packed_weight_for_the_input_gradient(
    layout: str, dtype: torch.dtype
) -> None:
    x, weight, bias = inputs((2, 256, 3, 5), 512, dtype)
    weight = oracle.laid_out(weight, layout)
    rest = (weight, bias)
    grad = oracle.laid_out(torch.randn_like(plain(x, *rest)), "channels_last")
    exact = both(plain, x.double(), (weight.double(), bias.double()), grad.double())
    with oracle.poisoned():
        found = ours("native", x, rest, grad)
    oracle.assert_as_exact_as_torch(found, both(plain, x, rest, grad), exact)
    assert {name[0] for name in weight._rewardprop_packs._made} == {"upsampled forward"}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@needs_onednn
def test_lies_in_memory_as_pytorchs(layout: str) -> None:
    x, *rest = inputs(layout=layout)
    grad = torch.randn_like(plain(x, *rest))
    expected = both(plain, x, tuple(rest), grad)
    for found, theirs in zip(ours("auto", x, tuple(rest), grad), expected, strict=True):
        assert found.stride() == theirs.stride()
        torch.testing.assert_close(found, theirs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck_in_float64(layout: str) -> None:
    x, weight, bias = inputs((2, 4, 2, 3), 5, torch.float64, layout)
    assert torch.autograd.gradcheck(
        lambda x: frozen_upsample_conv2d(x, weight, bias), x.requires_grad_()
    )


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    x, *rest = inputs((2, 64, 17, 13), 96, dtype)
    grad = torch.randn_like(plain(x, *rest))
    expected = ours("native", x, tuple(rest), grad)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(34):
                assert all(map(torch.equal, ours("native", x, tuple(rest), grad), expected))
    finally:
        torch.set_num_threads(threads)


@needs_onednn
def test_nan_reaches_the_same_pixels() -> None:
    x, *rest = inputs()
    x[0, 3, 2, 2] = float("nan")
    grad = torch.randn_like(plain(x, *rest))
    grad[0, 0, 0, 0] = float("nan")
    expected = both(plain, x, tuple(rest), grad)
    for found, theirs in zip(ours("native", x, tuple(rest), grad), expected, strict=True):
        torch.testing.assert_close(found, theirs, equal_nan=True)


# --- what is kept ---


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_the_weight_and_nothing_else(layout: str) -> None:
    x, weight, bias = inputs(layout=layout)
    kept = oracle.kept_for_backward(
        lambda: frozen_upsample_conv2d(x.requires_grad_(), weight, bias)
    )
    assert [tensor.untyped_storage().data_ptr() for tensor in kept] == [
        weight.untyped_storage().data_ptr()
    ]


@needs_onednn
def test_the_copies_are_counted_and_belong_to_the_weight_as_it_is() -> None:
    x, weight, bias = inputs((2, 32, 5, 7), 32)
    frozen_upsample_conv2d(x, weight, bias)
    once = packed_bytes([weight])
    assert once >= 16 / 9 * weight.nbytes
    y = frozen_upsample_conv2d(x.requires_grad_(), weight, bias)
    assert packed_bytes([weight]) == once
    y.sum().backward()
    assert packed_bytes([weight]) == 2 * once
    with torch.no_grad():
        weight.mul_(2)
        torch.testing.assert_close(frozen_upsample_conv2d(x, weight, bias), plain(x, weight, bias))
    drop_packs([weight])
    assert packed_bytes([weight]) == 0


@needs_onednn
def test_says_where_it_does_not_run() -> None:
    x, weight, _ = inputs()
    assert native.why_not(x, weight, None) is None
    for arguments, reason in (
        ((x.double(), weight), "it takes float32 and bfloat16"),
        ((x.contiguous(), weight), "not in channels_last"),
        ((x[:0], weight), "there are 0 pixels"),
        ((x, weight.repeat(1, 2, 1, 1)[:, ::2]), "strided view"),
        ((x.to("meta"), weight), "runs on the CPU"),
    ):
        found = native.why_not(*arguments, None)
        assert found is not None
        assert reason in found
    assert native.why_not(x, weight[:4], None) is None
    assert "from 16 channels" in str(native.why_no_gain(x, weight[:4], None))


# --- the boundary ---


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    x, weight, bias = inputs((2, 32, 3, 4), 32, dtype)
    x = oracle.laid_out(x, layout).detach().requires_grad_()
    torch.library.opcheck(OP, (x, weight, bias))
    grad = oracle.laid_out(torch.randn(2, 32, 6, 8).to(dtype), layout)
    torch.library.opcheck(OP_BACKWARD, (grad, weight, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_into_one_graph_with_the_same_gradient(dynamic: bool) -> None:
    x, weight, bias = inputs()

    def run(x: Tensor) -> Tensor:
        return frozen_upsample_conv2d(x.sin(), weight, bias).square()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x.requires_grad_()
    eager, traced = run(x), compiled(x)
    assert torch.equal(traced, eager)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (eager, traced)))


def test_an_empty_batch_is_no_error() -> None:
    x, weight, bias = inputs((0, 32, 5, 7))
    y = frozen_upsample_conv2d(x.requires_grad_(), weight, bias)
    y.sum().backward()
    assert y.shape == (0, 48, 10, 14)
    assert x.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 31, 5, 7)}, r"it must be \(B, 32, H, W\)"),
        ({"x": torch.zeros(32, 5, 7)}, r"x has shape \(32, 5, 7\)"),
        ({"x": torch.zeros(2, 32, 0, 7)}, "H and W at least 1"),
        ({"x": torch.zeros(2, 32, 5, 7).int()}, "x has dtype torch.int32; allowed are float32"),
        ({"x": torch.zeros(2, 32, 5, 7).half()}, "weight has dtype torch.float32; it must be that"),
        ({"weight": torch.zeros(48, 32, 1, 1)}, r"expected \(N, C, 3, 3\)"),
        ({"weight": torch.zeros(0, 32, 3, 3)}, "no size 0"),
        ({"weight": torch.zeros(48, 32, 3, 3, device="meta")}, "weight is on meta, x on cpu"),
        ({"weight": torch.zeros(48, 32, 3, 3).requires_grad_()}, "weight requires a gradient"),
        ({"bias": torch.zeros(47)}, r"bias has shape \(47,\); .* it must be \(48,\)"),
        ({"bias": torch.zeros(48).double()}, "bias has dtype torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[str, Any], message: str) -> None:
    x, weight, bias = inputs()
    with pytest.raises(ValueError, match=message):
        frozen_upsample_conv2d(**{"x": x, "weight": weight, "bias": bias, **change})


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.zeros(2, 48, 5, 14), r"grad has shape \(2, 48, 5, 14\); expected \(B, N, 2H, 2W\)"),
        (torch.zeros(48, 10, 14), r"grad has shape \(48, 10, 14\)"),
        (torch.zeros(2, 32, 10, 14), r"grad is \(2, 32, 10, 14\) .* must be \(2, 48, 10, 14\)"),
        (torch.zeros(2, 48, 10, 14).bfloat16(), r"grad is .* torch.bfloat16 .* torch.float32"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused(grad: Tensor, message: str) -> None:
    _, weight, _ = inputs()
    with pytest.raises(ValueError, match=message):
        OP_BACKWARD(grad, weight, True)
