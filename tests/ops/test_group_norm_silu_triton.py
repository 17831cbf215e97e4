"""The Triton kernels of group normalisation, in Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewardprop_fast import ops
from rewardprop_fast.ops import group_norm, triton_runtime
from tests.ops.oracle import (
    assert_as_exact_as_torch,
    laid_out,
    output_and_gradients,
    poisoned,
)

pytest.importorskip("triton")

from rewardprop_fast.ops.group_norm_silu import triton_launch


def check(
    shape: tuple[int, ...],
    groups: int,
    layout: str,
    silu: bool = True,
    affine: bool = True,
    dtype: torch.dtype = torch.float32,
    offset: float = 0.5,
) -> None:
    x = laid_out((2 * torch.randn(shape) + offset).to(dtype), layout)
    weight, bias = (
        (torch.randn(shape[1]) + one).to(dtype) if affine else None for one in (1.0, 0.0)
    )
    grad = laid_out(torch.randn(shape).to(dtype), layout)
    leaves = [x, weight, bias]

    def theirs(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        y = torch.group_norm(x, groups, w, b)
        return F.silu(y) if silu else y

    with ops.backend("triton", strict=True), poisoned():
        ours = output_and_gradients(
            lambda x, w, b: group_norm(x, groups, w, b, silu=silu), leaves, grad
        )
    torchs = output_and_gradients(theirs, leaves, grad)
    exact = output_and_gradients(
        theirs, [None if leaf is None else leaf.double() for leaf in leaves], grad.double()
    )
    # Of few elements PyTorch's own error is a matter of luck: eight roundings count as none.
    unit = max(16 * max(1.0, offset / 4) * 2**-23, torch.finfo(dtype).eps)
    assert_as_exact_as_torch(ours, torchs, exact, unit=unit)


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program may hold a group, and tiles are small: the form of large tensors on small ones."""
    monkeypatch.setattr(triton_launch, "_WHOLE", 0)
    monkeypatch.setattr(triton_launch, "_TILE", 64)
    monkeypatch.setattr(triton_launch, "_PROGRAMS", 6)


#: SiLU, weight and bias, dtype.
VARIANTS = pytest.mark.parametrize(
    ("silu", "affine", "dtype"),
    [
        (True, True, torch.float32),
        (True, False, torch.float32),
        (False, True, torch.float32),
        (True, True, torch.float16),
    ],
)


@VARIANTS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_whole_groups(layout: str, silu: bool, affine: bool, dtype: torch.dtype) -> None:
    check((2, 12, 7, 5), 4, layout, silu, affine, dtype)


@pytest.mark.usefixtures("sliced")
@VARIANTS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sliced_groups(layout: str, silu: bool, affine: bool, dtype: torch.dtype) -> None:
    check((2, 12, 7, 5), 4, layout, silu, affine, dtype)


@settings(max_examples=8, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(2, 5), st.integers(1, 5), st.integers(2, 7)),
    groups=st.integers(1, 4),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    is_sliced=st.booleans(),
    offset=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_in_any_shape(
    shape: tuple[int, ...], groups: int, layout: str, is_sliced: bool, offset: float, seed: int
) -> None:
    torch.manual_seed(seed)
    batch, width, *spatial = shape
    with pytest.MonkeyPatch.context() as patch:
        if is_sliced:
            patch.setattr(triton_launch, "_WHOLE", 0)
            patch.setattr(triton_launch, "_TILE", 64)
            patch.setattr(triton_launch, "_PROGRAMS", 4)
        check((batch, width * groups, spatial[0] + 1, spatial[1]), groups, layout, offset=offset)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sizes_of_a_real_network(layout: str) -> None:
    """Untouched constants: one image, more than one slice."""
    shape = (1, 40, 34, 32)
    plan = triton_launch._plan(laid_out(torch.empty(shape), layout), 2)
    assert not plan.is_whole
    assert plan.slices[1] > 1
    check(shape, 2, layout)


@pytest.mark.parametrize("form", ["whole", "sliced"])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_gradients_alone(
    wanted: tuple[int, ...], form: str, request: pytest.FixtureRequest
) -> None:
    if form == "sliced":
        request.getfixturevalue("sliced")
    x, weight, bias = torch.randn(2, 12, 5, 4), torch.randn(12), torch.randn(12)
    grad = torch.randn(x.shape)
    with ops.backend("triton", strict=True):
        found = output_and_gradients(
            lambda x, w, b: group_norm(x, 3, w, b, silu=True), [x, weight, bias], grad
        )
        leaves = [
            leaf.clone().requires_grad_(bool(flag))
            for leaf, flag in zip((x, weight, bias), wanted, strict=True)
        ]
        group_norm(leaves[0], 3, *leaves[1:], silu=True).backward(grad)
    for leaf, flag, full in zip(leaves, wanted, found[1:], strict=True):
        assert (leaf.grad is not None) == bool(flag)
        if flag:
            assert torch.equal(leaf.grad, full)


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_means_leave_the_deviation(layout: str) -> None:
    x = laid_out(torch.randn(1, 16, 9, 8) + 1e4, layout)
    with ops.backend("triton", strict=True):
        _, mean, rstd = torch.ops.rewardprop_fast.group_norm_silu(x, None, None, 4, 1e-5, False)
    exact = x.double().reshape(1, 4, -1)
    torch.testing.assert_close(mean.double(), exact.mean(2), rtol=2**-23, atol=0)
    true_rstd = (exact.var(2, correction=0) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), true_rstd, rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what is not finite
@pytest.mark.parametrize("form", ["whole", "sliced"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_infinities_spread_as_in_torch(
    layout: str, form: str, request: pytest.FixtureRequest
) -> None:
    if form == "sliced":
        request.getfixturevalue("sliced")

    def theirs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.silu(torch.group_norm(x, 2, w, b))

    for place, value in [(0, "nan"), (0, "inf"), (2, "-inf"), (3, "nan")]:
        x, grad = (laid_out(torch.randn(2, 4, 2, 5), layout) for _ in range(2))
        tensors = [x, torch.randn(4), torch.randn(4), grad]
        tensors[place][(1,) * tensors[place].dim()] = float(value)
        leaves = tensors[:3]
        with ops.backend("triton", strict=True):
            ours = output_and_gradients(
                lambda x, w, b: group_norm(x, 2, w, b, silu=True), leaves, grad
            )
        for own, plain in zip(ours, output_and_gradients(theirs, leaves, grad), strict=True):
            assert torch.equal(own.isnan(), plain.isnan()), (place, value)
            assert torch.equal(own.isinf(), plain.isinf()), (place, value)


@pytest.mark.parametrize("shape", [(0, 8, 5, 3), (2, 8, 0, 3)])
def test_nothing_is_no_error(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    weight, bias = (torch.ones(8, requires_grad=True) for _ in range(2))
    with ops.backend("triton", strict=True):
        group_norm(x, 4, weight, bias, silu=True).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(8))
    assert torch.equal(bias.grad, torch.zeros(8))


def test_one_image_fills_a_gpu_and_small_groups_are_one_launch() -> None:
    def launches(*shape: int) -> list[triton_runtime.Launch]:
        x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        with triton_runtime.recording() as recording:
            _, mean, rstd = triton_launch.forward(x, None, None, 32, 1e-5, True)
            triton_launch.backward(x, x, mean, rstd, None, None, True, (True, False, False))
        return recording.launches

    assert [launch.grid for launch in launches(2, 1280, 8, 8)] == [(64,)] * 2
    for shape in ((1, 320, 64, 64), (1, 128, 512, 512), (1, 512, 64, 64)):
        found = launches(*shape)
        assert len(found) == 6
        walking = [launch.grid[0] for launch in found if "BLOCK_P" in launch.constexprs]
        assert all(256 <= programs <= 1100 for programs in walking), walking
