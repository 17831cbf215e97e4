"""The CUDA C++ kernels of group normalisation, emulated on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewardprop_fast import ops
from rewardprop_fast.ops import cuda_module, group_norm
from rewardprop_fast.ops.group_norm_silu import cuda
from tests.ops.oracle import (
    assert_as_exact_as_torch,
    laid_out,
    output_and_gradients,
    poisoned,
)

pytestmark = pytest.mark.emulated_cuda

LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def sliced(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    """The form of large tensors on small ones, or of small ones (0) on all."""
    monkeypatch.setattr(cuda, "_slice", lambda *_, **__: positions)


@pytest.fixture(params=[0, 16, 7], ids=["whole", "sliced", "odd_slices"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    sliced(monkeypatch, request.param)


def check(
    shape: tuple[int, ...],
    groups: int,
    layout: str,
    dtype: torch.dtype = torch.float32,
    silu: bool = True,
    affine: bool = True,
    offset: float = 0.5,
    parameter_dtype: torch.dtype | None = None,
    unaligned: bool = False,
    few: bool = False,
) -> None:
    """Values and all gradients against float64, measured by PyTorch's own error."""
    x = laid_out((2 * torch.randn(shape) + offset).to(dtype), layout)
    if unaligned:
        x = at_odd_address(x)
    weight, bias = (
        (torch.randn(shape[1]) + one).to(parameter_dtype or dtype) if affine else None
        for one in (1.0, 0.0)
    )
    grad = laid_out(torch.randn(shape).to(dtype), layout)
    leaves = [x, weight, bias]

    def theirs(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        y = torch.group_norm(x, groups, w, b)
        return F.silu(y) if silu else y

    with ops.backend("cuda", strict=True), poisoned():
        ours = output_and_gradients(
            lambda x, w, b: group_norm(x, groups, w, b, silu=silu), leaves, grad
        )
    exact = output_and_gradients(
        theirs, [None if leaf is None else leaf.double() for leaf in leaves], grad.double()
    )
    if parameter_dtype not in (None, dtype):  # which PyTorch refuses on a CPU
        parameters = [None if leaf is None else leaf.to(dtype) for leaf in leaves[1:]]
        torchs = output_and_gradients(theirs, [x, *parameters], grad)
        torchs[2:] = [t if t is None else t.to(parameter_dtype) for t in torchs[2:]]
    else:
        torchs = output_and_gradients(theirs, leaves, grad)
    # Of few elements PyTorch's own error is a matter of luck: eight roundings count as none.
    unit = max(16 * max(1.0, offset / 4) * 2**-23, torch.finfo(dtype).eps)
    if few:
        # A channel's sum of few terms may cancel: its error is measured by the terms.
        groups_of_x = x.double().reshape(shape[0], groups, -1)
        xhat = (groups_of_x - groups_of_x.mean(2, keepdim=True)).reshape(shape) / (
            groups_of_x.var(2, correction=0, keepdim=True).add(1e-5).sqrt()
        ).repeat_interleave(shape[1] // groups, 1).reshape(shape[0], shape[1], 1, 1)
        terms = (grad.double().abs() * (1 + xhat.abs())).sum((0, 2, 3))
        for found, truth in zip(ours[2:], exact[2:], strict=True):
            assert ((found.double() - truth).abs() <= unit / 2 * terms).all()
        ours, torchs, exact = ours[:2], torchs[:2], exact[:2]
    assert_as_exact_as_torch(ours, torchs, exact, unit=unit)


def at_odd_address(tensor: Tensor) -> Tensor:
    """The same values and strides one element further on: no thread may load two at once."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.usefixtures("form")
@LAYOUTS
@DTYPES
def test_is_as_near_to_float64_as_pytorch(dtype: torch.dtype, layout: str) -> None:
    check((2, 12, 7, 5), 4, layout, dtype)
    check((2, 32, 8, 6), 2, layout, dtype)  # in packs


@pytest.mark.usefixtures("form")
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("silu", "affine", "parameter_dtype"),
    [(False, True, None), (True, False, None), (True, True, torch.float32)],
)
def test_variants(
    silu: bool, affine: bool, parameter_dtype: torch.dtype | None, dtype: torch.dtype, layout: str
) -> None:
    check((1, 16, 5, 8), 2, layout, dtype, silu, affine, parameter_dtype=parameter_dtype)


@pytest.mark.usefixtures("form")
@LAYOUTS
def test_arrays_that_are_not_aligned_to_packs(layout: str) -> None:
    check((2, 16, 4, 8), 4, layout, torch.bfloat16, unaligned=True)


@LAYOUTS
@pytest.mark.parametrize("width", [1, 2, 4, 8, 10, 3])
def test_packs_of_every_width(width: int, layout: str) -> None:
    check((2, 3 * width, 1, width), 3, layout, torch.bfloat16)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(1, 6), st.integers(2, 9)),
    groups=st.integers(1, 4),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    slice_P=st.sampled_from([0, 1, 5, 8, 24]),
    offset=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_in_any_shape(
    shape: tuple[int, ...], groups: int, layout: str, slice_P: int, offset: float, seed: int
) -> None:
    torch.manual_seed(seed)
    batch, width, *spatial = shape
    with pytest.MonkeyPatch.context() as patch:
        sliced(patch, slice_P)
        check(
            (batch, width * groups, spatial[0] + 1, spatial[1]),
            groups,
            layout,
            offset=offset,
            few=True,
        )


@LAYOUTS
def test_sizes_of_a_real_network(layout: str) -> None:
    """Nothing forced: one image, more than one slice, more than one block of channels."""
    shape = (1, 80, 34, 32)
    x = laid_out(torch.empty(shape), layout)
    assert 0 < cuda._slice(x, 2, arrays=1) < 34 * 32
    check(shape, 2, layout)


@pytest.mark.races
@pytest.mark.parametrize("slice_P", [0, 24])
def test_more_than_one_block(slice_P: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sliced(monkeypatch, slice_P)
    check((1, 8, 6, 8), 2, "channels_last")


@pytest.mark.usefixtures("form")
@LAYOUTS
def test_is_the_same_every_time_and_gradients_alone_are_the_same(layout: str) -> None:
    leaves = [laid_out(torch.randn(2, 12, 5, 4), layout), torch.randn(12), torch.randn(12)]
    grad = torch.randn(2, 12, 5, 4)

    def run(wanted: tuple[bool, ...]) -> list[Tensor | None]:
        own = [t.clone().requires_grad_(w) for t, w in zip(leaves, wanted, strict=True)]
        with ops.backend("cuda", strict=True), poisoned():
            y = group_norm(own[0], 3, *own[1:], silu=True)
            y.backward(grad)
        return [y.detach(), *(leaf.grad for leaf in own)]

    full = run((True, True, True))
    for wanted in [(True, True, True), *(tuple(i == j for i in range(3)) for j in range(3))]:
        for found, first, needed in zip(run(wanted), full, (True, *wanted), strict=True):
            assert (found is not None) == needed
            assert found is None or torch.equal(found, first)


@pytest.mark.usefixtures("form")
@LAYOUTS
def test_a_hundred_runs_give_the_same_bits(layout: str) -> None:
    leaves = [laid_out(torch.randn(2, 6, 3, 4), layout), torch.randn(6), torch.randn(6)]
    grad = torch.randn(2, 6, 3, 4)

    def run() -> list[Tensor | None]:
        return output_and_gradients(lambda x, w, b: group_norm(x, 3, w, b, silu=True), leaves, grad)

    with ops.backend("cuda", strict=True), poisoned():
        first = run()
        for _ in range(99):
            assert all(map(torch.equal, run(), first))


@pytest.mark.usefixtures("form")
@LAYOUTS
def test_large_means_leave_the_deviation(layout: str) -> None:
    x = laid_out(torch.randn(1, 16, 9, 8) + 1e4, layout)
    with ops.backend("cuda", strict=True):
        _, mean, rstd = torch.ops.rewardprop_fast.group_norm_silu(x, None, None, 4, 1e-5, False)
    exact = x.double().reshape(1, 4, -1)
    torch.testing.assert_close(mean.double(), exact.mean(2), rtol=2**-23, atol=0)
    true_rstd = (exact.var(2, correction=0) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), true_rstd, rtol=1e-4, atol=0)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_spoils_its_group_alone(special: float) -> None:
    x = torch.randn(2, 12, 6, 4)
    x[1, 5, 3, 2] = special
    weight, bias = torch.randn(12), torch.randn(12)
    with ops.backend("cuda", strict=True):
        y = group_norm(x, 3, weight, bias, silu=True)
    assert torch.equal(y.isnan(), F.silu(F.group_norm(x, 3, weight, bias)).isnan())
    assert y.isnan().sum() == 4 * 24


@pytest.mark.parametrize("shape", [(0, 8, 5, 3), (2, 8, 0, 3)])
def test_nothing_is_no_error(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    weight, bias = (torch.ones(8, requires_grad=True) for _ in range(2))
    with ops.backend("cuda", strict=True):
        group_norm(x, 4, weight, bias, silu=True).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(8))
    assert torch.equal(bias.grad, torch.zeros(8))


def slice_of(shape: tuple[int, int, int], arrays: int = 1) -> int:
    """Of (B, C, P) in 32 groups, bfloat16, channels last."""
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16).transpose(1, 2).contiguous()
    return cuda._slice(x.transpose(1, 2), 32, arrays=arrays)


def test_groups_that_fit_are_kept_and_others_fill_a_gpu() -> None:
    assert slice_of((2, 1280, 64)) == slice_of((2, 1280, 64), arrays=2) == 0
    assert slice_of((1, 640, 32 * 32)) == 0  # just: 40 KB
    assert slice_of((1, 640, 32 * 32), arrays=2) > 0
    for shape in ((1, 320, 64 * 64), (1, 128, 512 * 512), (1, 512, 64 * 64)):
        # A block takes 64 channels at most where they are no multiple of more, otherwise 256.
        blocks = -(-shape[2] // slice_of(shape)) * -(-shape[1] // (64 if shape[1] == 320 else 256))
        assert 256 <= blocks <= 1024, (shape, blocks)


def call(**changes: object) -> None:
    """A call whose every argument is right, with changes."""
    memory = torch.zeros(256)
    at = [memory.data_ptr() + 4 * i for i in range(256)]
    arguments = {"x": at[0], "weight": at[64], "weight_dtype": "float32", "bias": None}
    arguments |= {"bias_dtype": "float32", "mean": at[80], "rstd": at[84], "y": at[96]}
    arguments |= {"partial": None, "partial_count": 0, "batch": 1, "channels": 4, "positions": 8}
    arguments |= {"groups": 2, "channels_last": False, "slice": 0, "eps": 1e-5, "silu": True}
    arguments |= {"dtype": "float32", "device": 0, "stream": 0}
    cuda_module.module().group_norm_silu(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 3}, "are not the sizes of an array in groups"),
        ({"positions": 2**62}, "are not the sizes of an array in groups"),
        ({"positions": 10000}, "too many for one block; slice must not be 0"),
        ({"slice": 4}, "partial has 0 elements; expected 16"),
        ({"slice": -1}, "slice is -1"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"weight_dtype": "float16"}, "weight_dtype is 'float16'; allowed are that of x"),
        ({"x": 0}, "x is null"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_right_arguments_are_not_refused() -> None:
    call()
