"""Group normalisation with SiLU against torch's own operators, in every layout and dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewardprop_fast import ops
from rewardprop_fast.ops import group_norm, native
from tests.ops.oracle import (
    LAYOUTS,
    assert_as_exact_as_torch,
    kept_for_backward,
    laid_out,
    native_missing,
    output_and_gradients,
    poisoned,
)

OP = torch.ops.rewardprop_fast.group_norm_silu.default
OP_BACKWARD = torch.ops.rewardprop_fast.group_norm_silu_backward.default

needs_native = pytest.mark.skipif(**native_missing())
#: What runs on a CPU.
CPU_BACKENDS = [pytest.param("native", marks=needs_native), "reference"]


def theirs(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> Tensor:
    """PyTorch's own."""
    # F.group_norm refuses a group of one element, torch.group_norm does not.
    y = torch.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def problem(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str = "contiguous",
    *,
    affine: bool = True,
    offset: float = 0.5,
    parameter_dtype: torch.dtype | None = None,
) -> list[Tensor | None]:
    """x, weight, bias."""
    x = laid_out((2 * torch.randn(shape) + offset).to(dtype), layout)
    if not affine:
        return [x, None, None]
    weight, bias = (
        (torch.randn(shape[1]) + one).to(parameter_dtype or dtype) for one in (1.0, 0.0)
    )
    return [x, weight, bias]


def check(
    backend: str,
    leaves: list[Tensor | None],
    groups: int,
    silu: bool,
    grad: Tensor,
    eps: float = 1e-5,
    unit: float | None = None,
) -> None:
    """Values and all gradients, against float64, measured by PyTorch's own error."""
    with ops.backend(backend, strict=True), poisoned():
        ours = output_and_gradients(
            lambda x, w, b: group_norm(x, groups, w, b, eps, silu), leaves, grad
        )
    torchs = output_and_gradients(lambda x, w, b: theirs(x, groups, w, b, eps, silu), leaves, grad)
    exact = output_and_gradients(
        lambda x, w, b: theirs(x, groups, w, b, eps, silu),
        [None if leaf is None else leaf.double() for leaf in leaves],
        grad.double(),
    )
    assert_as_exact_as_torch(ours, torchs, exact, unit=unit)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_torch(
    dtype: torch.dtype, layout: str, silu: bool, affine: bool, backend: str
) -> None:
    leaves = problem((3, 40, 9, 7), dtype, layout, affine=affine)
    check(backend, leaves, 8, silu, torch.randn(3, 40, 9, 7).to(dtype))


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck_in_float64(layout: str, silu: bool) -> None:
    leaves = [
        None if leaf is None else leaf.requires_grad_()
        for leaf in problem((2, 6, 3, 2), torch.float64, layout)
    ]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, 3, w, b, silu=silu), leaves)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, affine: bool, layout: str) -> None:
    x, weight, bias = problem((2, 32, 5, 3), dtype, layout, affine=affine)
    assert x is not None
    leaves = [None if leaf is None else leaf.requires_grad_() for leaf in (x, weight, bias)]
    torch.library.opcheck(OP, (*leaves, 8, 1e-5, True))
    with torch.no_grad():
        _, mean, rstd = OP(x, weight, bias, 8, 1e-5, True)
    grad = laid_out(torch.randn(x.shape).to(dtype), layout)
    saved, needs = (x, mean, rstd, weight, bias), [True, affine, affine]
    torch.library.opcheck(
        OP_BACKWARD,
        (grad, *(t if t is None else t.detach() for t in saved), True, needs),
    )


def test_opcheck_with_other_dimensions_and_orders() -> None:
    transposed = torch.randn(2, 15, 32).transpose(1, 2).requires_grad_()
    rotated = torch.randn(5, 2, 3, 32).permute(1, 3, 2, 0).requires_grad_()
    volume = torch.randn(2, 32, 2, 3, 2).to(memory_format=torch.channels_last_3d).requires_grad_()
    for x in (transposed, rotated, volume, torch.randn(3, 32, requires_grad=True)):
        torch.library.opcheck(OP, (x, None, None, 8, 1e-5, True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_into_one_graph_with_the_same_gradient(layout: str) -> None:
    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm(group_norm(x, 4, weight, bias, silu=True).sin(), 2, weight)

    leaves = [leaf for leaf in problem((2, 8, 5, 3), torch.float32, layout) if leaf is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    eager = block(*leaves)
    traced = torch.compile(block, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(traced, eager)
    assert traced.stride() == eager.stride()
    for ours, plain in zip(
        torch.autograd.grad(traced.square().sum(), leaves),
        torch.autograd.grad(eager.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_x_and_two_numbers_a_group(layout: str, backend: str) -> None:
    x, weight, bias = problem((2, 32, 8, 8), torch.bfloat16, layout)
    assert x is not None
    assert weight is not None
    assert bias is not None
    x.requires_grad_()
    with ops.backend(backend, strict=True):
        kept = kept_for_backward(lambda: group_norm(x, 8, weight, bias, silu=True))
    own = {t.untyped_storage().data_ptr() for t in (x, weight, bias)}
    others = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert [(t.dtype, t.numel()) for t in others] == [(torch.float32, 16)] * 2


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_computes_only_the_gradients_that_are_needed(
    layout: str, wanted: tuple[int, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves: list[Any] = problem((2, 12, 5, 3), torch.float32, layout)
    grad = torch.randn(2, 12, 5, 3)
    with ops.backend(backend, strict=True):
        complete = output_and_gradients(
            lambda x, w, b: group_norm(x, 3, w, b, silu=True), leaves, grad
        )[1:]
        for leaf, flag in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(bool(flag))
        y, mean, rstd = OP(*leaves, 3, 1e-5, True)
        found = OP_BACKWARD(
            grad, *(t.detach() for t in (leaves[0], mean, rstd, *leaves[1:])), True, wanted
        )
        y.backward(grad)
    assert len(found) == sum(wanted)
    for leaf, flag, full in zip(leaves, wanted, complete, strict=True):
        assert (leaf.grad is not None) == bool(flag)
        if flag:
            assert torch.equal(leaf.grad, full)


def test_mean_and_rstd_carry_no_gradient() -> None:
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    y, mean, rstd = OP(x, None, None, 2, 1e-5, False)
    assert y.requires_grad
    assert not mean.requires_grad
    assert not rstd.requires_grad
    grouped = x.detach().reshape(2, 2, -1)
    torch.testing.assert_close(mean, grouped.mean(2))
    torch.testing.assert_close(rstd, (grouped.var(2, correction=0) + 1e-5).rsqrt())


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(group_norm(x, 2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8, 5, 3), (2, 8, 0, 3), (0, 8)])
def test_nothing_is_no_error(shape: tuple[int, ...], backend: str) -> None:
    x = torch.zeros(shape, requires_grad=True)
    weight, bias = (torch.ones(8, requires_grad=True) for _ in range(2))
    with ops.backend(backend, strict=True):
        y = group_norm(x, 4, weight, bias, silu=True)
        y.sum().backward()
    assert y.shape == shape
    assert torch.equal(weight.grad, torch.zeros(8))
    assert torch.equal(bias.grad, torch.zeros(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8)}, r"x has shape \(8,\); expected \(B, C, \*spatial\)"),
        ({"x": torch.zeros(2, 8, 3).int()}, r"x has dtype torch.int32; allowed are float32"),
        ({"num_groups": 3}, "num_groups is 3; it must divide the 8 channels"),
        ({"num_groups": 0}, "num_groups is 0; it must divide"),
        ({"eps": -1.0}, "eps is -1.0; it must not be negative"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"weight": torch.zeros(4)}, r"weight has shape \(4,\); expected \(8,\)"),
        ({"bias": torch.zeros(8, 1)}, r"bias has shape \(8, 1\); expected \(8,\)"),
        ({"weight": torch.zeros(8).half()}, "weight has dtype torch.float16; allowed are that of"),
        ({"bias": torch.zeros(8, device="meta")}, "bias is on meta, x on cpu; use one device"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 8, 3), "num_groups": 4} | change
    with pytest.raises(ValueError, match=message):
        group_norm(**arguments)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(1, 8, 1, 1), r"grad is \(1, 8, 1, 1\) .* it must be \(2, 8, 3, 3\)"),
        (0, torch.zeros(2, 8, 3, 3).bfloat16(), r"grad is .* torch.bfloat16 .* torch.float32 on"),
        (0, torch.zeros(2, 8, 3, 3, device="meta"), r"grad is .* on meta; .* on cpu"),
        (2, torch.zeros(1, 4), r"mean is \(1, 4\) .* it must be \(2, 4\) torch.float32"),
        (2, torch.zeros(2, 3), "num_groups is 3; it must divide the 8 channels"),
        (2, torch.zeros(8), "num_groups is 0; it must divide"),
        (3, torch.zeros(2, 4).double(), r"rstd is .* torch.float64 .* torch.float32"),
        (4, torch.zeros(4), r"weight has shape \(4,\); expected \(8,\)"),
        (5, torch.zeros(8).half(), "bias has dtype torch.float16"),
    ],
)
def test_a_backward_pass_of_something_else_is_refused(
    place: int, value: Tensor, message: str
) -> None:
    x, statistics, parameter = torch.zeros(2, 8, 3, 3), torch.ones(2, 4), torch.zeros(8)
    arguments = [x, x, statistics, statistics, parameter, parameter]
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        OP_BACKWARD(*arguments, True, [True, True, True])


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 11), st.integers(1, 70)),
    groups=st.integers(1, 7),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    silu=st.booleans(),
    offset=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_native_in_any_shape(
    shape: tuple[int, ...],
    groups: int,
    layouts: tuple[str, str],
    dtype: torch.dtype,
    silu: bool,
    offset: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    batch, width, *spatial = shape
    whole = (batch, width * groups, *spatial)
    assume(width * spatial[0] * spatial[1] > 2)  # smaller groups are nothing but rounding error
    leaves = problem(whole, dtype, layouts[0], offset=offset)
    grad = laid_out(torch.randn(whole).to(dtype), layouts[1])
    # Of a few elements PyTorch's own error is a matter of luck: eight roundings count as none.
    unit = 16 * max(1.0, offset / 4) * torch.finfo(torch.float32).eps
    check("native", leaves, groups, silu, grad, unit=max(unit, torch.finfo(dtype).eps))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 4, 1, 70001), 2),  # more than 2^16 rows of channels last, channels cut in pieces
        ((1, 6, 3, 23333), 1),
        ((16411, 8, 1, 4), 4),  # more than 2^16 groups
        ((2, 1300, 3, 5), 13),  # wide groups
        ((1, 2048, 1, 1), 32),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_native_cut_into_many_blocks(
    layout: str, shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    check("native", problem(shape, dtype, layout), groups, True, torch.randn(shape).to(dtype))


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_native_does_not_lose_the_deviation_in_a_large_mean(layout: str) -> None:
    """E[x^2] - E[x]^2 would be wrong by a factor of hundreds here, as torch's channels_last is.

    Single-precision means near 1e4 are rounded by up to 5e-4 deviations.
    """
    x = (torch.randn(1, 32, 33, 31) + 1e4).contiguous()
    x = laid_out(x, layout)
    with ops.backend("native", strict=True):
        _, mean, rstd = OP(x, None, None, 4, 1e-5, False)
    exact = x.double().reshape(1, 4, -1)
    torch.testing.assert_close(mean.double(), exact.mean(2), rtol=2**-23, atol=0)
    true_rstd = (exact.var(2, correction=0) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), true_rstd, rtol=1e-4, atol=0)


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("stride", [1, 4, 32, 128])
def test_native_measures_from_rows_that_may_be_far_off(stride: int, layout: str) -> None:
    """Of 256 rows eight far outside, among them those whose mean distances are taken from."""
    x = torch.randn(1, 64, 16, 16)
    x.reshape(64, 256)[:, ::stride][:, :8] += 1e4
    x = laid_out(x, layout)
    with ops.backend("native", strict=True):
        _, mean, rstd = OP(x, None, None, 4, 1e-5, False)
    exact = x.double().reshape(1, 4, -1)
    true_rstd = (exact.var(2, correction=0) + 1e-5).rsqrt()
    assert ((mean.double() - exact.mean(2)).abs() * true_rstd <= 2**-20).all()
    # Five bits are lost of a sum of 256 squares in 40 additions, which has an error near 2^-22.
    torch.testing.assert_close(rstd.double(), true_rstd, rtol=2**-18, atol=0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_native_is_the_same_for_any_number_of_threads(layout: str, dtype: torch.dtype) -> None:
    leaves = problem((2, 64, 37, 41), dtype, layout)
    grad = torch.randn(2, 64, 37, 41).to(dtype)

    def once(count: int) -> list[Tensor | None]:
        torch.set_num_threads(count)
        with ops.backend("native", strict=True):
            return output_and_gradients(
                lambda x, w, b: group_norm(x, 8, w, b, silu=True), leaves, grad
            )

    threads = torch.get_num_threads()
    try:
        first = once(1)
        for count in [1] * 50 + [2] * 40 + [3] * 10:
            for again, before in zip(once(count), first, strict=True):
                assert again is not None
                assert before is not None
                assert torch.equal(again, before)
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("silu", [True, False])
def test_nan_and_infinities_spread_as_in_torch(silu: bool, layout: str, dtype: torch.dtype) -> None:
    for place, value in [(0, "nan"), (0, "inf"), (1, "nan"), (2, "inf"), (2, "-inf"), (3, "nan")]:
        leaves = problem((2, 8, 5, 9), dtype, layout)
        grad = torch.randn(2, 8, 5, 9).to(dtype)
        tensor = (*leaves, grad)[place]
        assert tensor is not None
        tensor[(1,) * tensor.dim()] = float(value)
        with ops.backend("native", strict=True):
            ours = output_and_gradients(
                lambda x, w, b: group_norm(x, 4, w, b, silu=silu), leaves, grad
            )
        torchs = output_and_gradients(lambda x, w, b: theirs(x, 4, w, b, 1e-5, silu), leaves, grad)
        for own, plain in zip(ours, torchs, strict=True):
            assert own is not None
            assert plain is not None
            assert torch.equal(own.isnan(), plain.isnan()), (place, value)
            assert torch.equal(own.isinf(), plain.isinf()), (place, value)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_silu_is_right_from_end_to_end(layout: str, dtype: torch.dtype) -> None:
    """Every bfloat16 between -100 and 100 as z: weight and bias put it there."""
    z = torch.arange(-100, 100, 0.01).bfloat16().unique().to(dtype)
    x = laid_out(
        torch.tensor([-1.0, 1.0]).repeat(32).reshape(1, 1, 8, 8).expand(1, len(z), 8, 8), layout
    ).to(dtype)
    x.requires_grad_()
    bias = z.clone().requires_grad_()
    with ops.backend("native", strict=True):
        y = group_norm(x, 1, torch.zeros_like(z), bias, silu=True)
        (slopes,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    own = bias.detach().double().requires_grad_()
    exact = F.silu(own)
    (exact_slopes,) = torch.autograd.grad(exact.sum(), own)
    exact = exact.detach()[None, :, None, None].expand(x.shape)
    # Half a unit of bfloat16, and what the shorter sigmoid may add.
    unit = 3 * 2**-24 if dtype == torch.float32 else 2**-8 + 2**-12
    assert ((y.double() - exact).abs() <= unit * exact.abs() + 2**-120).all()
    # The slope has a zero, near which its error is that of what it is the difference of; it is
    # summed up over 64 rows.
    parts = (own.detach().abs() + 1) * torch.sigmoid(own.detach())
    rounding = 0.0 if dtype == torch.float32 else 2**-8
    allowed = rounding * exact_slopes.abs() + 2**-20 * parts + 2**-120
    assert ((slopes.double() / 64 - exact_slopes).abs() <= allowed).all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_silu_of_numbers_of_any_size(layout: str, dtype: torch.dtype) -> None:
    """Up to the largest there are; where the result is no denormal number, as PyTorch has it."""
    z = torch.cat([sign * 10.0 ** torch.arange(1.8, 38.5, 0.01) for sign in (-1, 1)]).to(dtype)
    x = torch.tensor([-1.0, 1.0]).repeat(32).reshape(1, 1, 8, 8).expand(1, len(z), 8, 8).to(dtype)
    leaves = [laid_out(x, layout), torch.zeros_like(z), z]
    grad = torch.ones_like(x)
    with ops.backend("native", strict=True):
        ours = output_and_gradients(lambda x, w, b: group_norm(x, 1, w, b, silu=True), leaves, grad)
    torchs = output_and_gradients(lambda x, w, b: theirs(x, 1, w, b, 1e-5, True), leaves, grad)
    for own, plain, roundings in zip(ours, torchs, (2, 2, 8, 8), strict=True):
        rtol = roundings * torch.finfo(dtype).eps  # those of weight and bias are sums over 64 rows
        torch.testing.assert_close(own, plain, rtol=rtol, atol=2.0**-110)


@needs_native
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16])
def test_float32_parameters_go_with_bfloat16(parameter_dtype: torch.dtype) -> None:
    leaves = problem((2, 16, 5, 5), torch.bfloat16, parameter_dtype=parameter_dtype)
    grad = torch.randn(2, 16, 5, 5).bfloat16()
    found = {}
    for backend in ("native", "reference"):
        with ops.backend(backend, strict=True):
            found[backend] = output_and_gradients(
                lambda x, w, b: group_norm(x, 4, w, b, silu=True), leaves, grad
            )
    dtypes = [torch.bfloat16, torch.bfloat16, parameter_dtype, parameter_dtype]
    for own, plain, dtype in zip(found["native"], found["reference"], dtypes, strict=True):
        assert own is not None
        assert own.dtype == dtype
        torch.testing.assert_close(own, plain)


#: Saves y and the gradients of fixed problems; some rows hold NaN, infinities and tiny numbers.
ISA_SCRIPT = """
import sys, torch
from rewardprop_fast import ops
found = []
for dtype in (torch.float32, torch.bfloat16):
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        x = torch.randn(4, 36, 7, 11)
        bias = torch.randn(36)
        x[1, 0, 0, 0], x[2, 35, 6, 10] = float("nan"), float("-inf")
        bias[3], bias[4], bias[5] = float("inf"), float("-inf"), -86.0
        x, bias = x.to(dtype).contiguous(memory_format=layout), bias.to(dtype)
        leaves = [x, (torch.randn(36) + 1).to(dtype), bias]
        grad = torch.randn(x.shape).to(dtype)
        for needed in ((1, 1, 1), (1, 0, 0)):
            for leaf, flag in zip(leaves, needed):
                leaf.requires_grad_(bool(flag))
            with ops.backend("native", strict=True):
                y = ops.group_norm(x, 4, leaves[1], bias, silu=True)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found += [y.detach(), *torch.autograd.grad(y, wanted, grad)]
torch.save(found, sys.argv[1])
"""


@needs_native
def test_instruction_sets_agree(tmp_path: Path) -> None:
    """Also on where NaN and infinity are, and in what rounds to bfloat16 with an instruction."""
    found = {}
    for isa in native.module().isa_report()["supported"]:
        subprocess.run(
            [sys.executable, "-c", ISA_SCRIPT, str(tmp_path / isa)],
            env={**os.environ, "REWARDPROP_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
        )
        found[isa] = torch.load(tmp_path / isa)
    for isa, tensors in found.items():
        for own, scalar in zip(tensors, found["scalar"], strict=True):
            # Fused multiply-adds round otherwise, and bfloat16 may then round to the next number.
            unit = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[own.dtype]
            torch.testing.assert_close(own, scalar, rtol=unit, atol=unit, equal_nan=True, msg=isa)
    if "avx512_bf16" in found:  # the two differ in that instruction alone
        for own, other in zip(found["avx512_bf16"], found["avx512"], strict=True):
            assert torch.equal(own.nan_to_num(), other.nan_to_num())
            assert torch.equal(own.isnan(), other.isnan())
