"""The operator against torch.nn.functional.conv2d and autograd, and its packed weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewardprop_fast import ops, processor
from rewardprop_fast.ops import columns, drop_packs, frozen_conv2d, onednn, packed_bytes, packing
from rewardprop_fast.ops.frozen_conv2d import FROZEN_CONV2D, native
from tests.ops import oracle

OP = torch.ops.rewardprop_fast.frozen_conv2d.default
OP_BACKWARD = torch.ops.rewardprop_fast.frozen_conv2d_backward.default

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
    weight_shape: tuple[int, ...] = (48, 32, 3, 3),
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    fan_in = weight_shape[1] * weight_shape[2] * weight_shape[3]
    x = oracle.laid_out(torch.randn(x_shape, dtype=dtype), layout)
    weight = oracle.laid_out(torch.randn(weight_shape, dtype=dtype) / fan_in**0.5, layout)
    return x, weight, torch.randn(weight_shape[0], dtype=dtype)


def ours(backend: str, x: Tensor, rest: tuple[Any, ...], grad: Tensor) -> list[Tensor]:
    """y and the gradient of x."""
    x = x.detach().requires_grad_()
    with ops.backend(backend, strict=True):
        y = frozen_conv2d(x, *rest)
        return [y.detach(), *torch.autograd.grad(y, x, grad)]


def torchs(x: Tensor, rest: tuple[Any, ...], grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = F.conv2d(x, *rest)
    return [y.detach(), *torch.autograd.grad(y, x, grad)]


def output_like(x: Tensor, rest: tuple[Any, ...]) -> Tensor:
    return torch.randn_like(F.conv2d(x, *rest))


@settings(max_examples=40, deadline=None)
@given(
    backend=st.sampled_from(["native", "reference"]),
    batch=st.integers(1, 3),
    channels=st.tuples(st.integers(16, 70), st.integers(16, 70)),
    size=st.tuples(st.integers(9, 19), st.integers(5, 19)),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 3), (5, 1)]),
    stride=st.sampled_from([1, 2, (1, 3)]),
    padding=st.sampled_from([0, 1, (2, 0), 6]),
    dilation=st.sampled_from([1, 2]),
    layouts=st.tuples(*[st.sampled_from(oracle.LAYOUTS)] * 2),
    with_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, *[torch.bfloat16] * HAS_BFLOAT16]),
)
@needs_onednn
def test_is_no_less_exact_than_conv2d(
    backend: str,
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: Any,
    padding: Any,
    dilation: Any,
    layouts: tuple[str, str],
    with_bias: bool,
    dtype: torch.dtype,
) -> None:
    wide, narrow = channels
    x, weight, bias = inputs((batch, wide, *size), (narrow, wide, *kernel), dtype)
    rest = (weight, bias if with_bias else None, stride, padding, dilation)
    if kernel == (1, 1) and (stride != 1 or layouts[0] != "channels_last"):
        backend = "reference"  # the memory of a 1x1 weight is in both layouts, so x decides
    # Elsewhere PyTorch 2.13's own convolution reads memory that nobody wrote, on AMX.
    known_good = dtype == torch.float32 or stride == 1 or (stride, dilation) == (2, 1)
    assume(known_good or processor.bfloat16() != "amx")
    if batch == 1 and dtype == torch.float32:
        backend = "auto"  # PyTorch's sums are more exact, which native says of itself
    grad = output_like(x, rest)
    x, grad = oracle.laid_out(x, layouts[0]), oracle.laid_out(grad, layouts[1])
    exact = torchs(
        x.double(), tuple(r.double() if isinstance(r, Tensor) else r for r in rest), grad.double()
    )
    with oracle.poisoned():
        found = ours(backend, x, rest, grad)
    oracle.assert_as_exact_as_torch(found, torchs(x, rest, grad), exact)
    again = ours(backend, x, rest, grad)
    for first, second in zip(found, again, strict=True):
        assert torch.equal(first, second)


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kernel", "padding", "dilation"),
    [((3, 3), 1, 2), ((2, 3), (2, 0), (3, 1)), ((5, 1), (4, 0), (2, 1)), ((3, 3), 2, (1, 2))],
)
def test_dilation_counts_in_both_passes(
    kernel: tuple[int, int], padding: Any, dilation: Any, dtype: torch.dtype
) -> None:
    x, weight, bias = inputs((2, 32, 12, 14), (48, 32, *kernel), dtype)
    rest = (weight, bias, 1, padding, dilation)
    grad = output_like(x, rest)
    exact = torchs(x.double(), (weight.double(), bias.double(), *rest[2:]), grad.double())
    with oracle.poisoned():
        found = ours("native", x, rest, grad)
    oracle.assert_as_exact_as_torch(found, torchs(x, rest, grad), exact)


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "geometry", [((3, 3), 1, 1), ((1, 1), 1, 0), ((3, 3), 2, 1), ((3, 2), 1, (1, 0))]
)
def test_packed_weights_serve_images_of_every_size(
    geometry: tuple[Any, ...], dtype: torch.dtype
) -> None:
    kernel, stride, padding = geometry
    x, weight, bias = inputs((2, 64, 8, 8), (128, 64, *kernel), dtype)
    rest = (weight, bias, stride, padding)
    for x_shape in ((2, 64, 8, 8), (1, 64, 20, 18), (5, 64, 8, 8), (2, 64, 9, 4)):
        x = oracle.laid_out(torch.randn(x_shape).to(dtype), "channels_last")
        grad = output_like(x, rest)
        found, expected = ours("native", x, rest, grad), torchs(x, rest, grad)
        exact = torchs(x.double(), (weight.double(), bias.double(), stride, padding), grad.double())
        oracle.assert_as_exact_as_torch(found, expected, exact)
        assert [t.stride() for t in found] == [t.stride() for t in expected]
    copies = {name[0]: len(made) for name, made in weight._rewardprop_packs._made.items()}
    if kernel == (1, 1):
        assert copies == {"linear forward": 1}
    else:  # where oneDNN's layout depends on the image, those of the last two sizes are kept
        of_all_sizes = onednn.images_of_one_layout(weight, x.shape) == ()
        assert copies == {"forward": 1 if of_all_sizes else 2, "input gradient": 2}


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((3, 3), 1, 1),
        ((3, 3), 2, 1),
        ((3, 2), (1, 2), (0, 1)),
        ((2, 3), (2, 1), (2, 0)),
        ((4, 1), 1, (2, 1)),
    ],
)
def test_few_pixels_need_no_packed_weight_for_the_input_gradient(
    kernel: tuple[int, int], stride: Any, padding: Any, weight_layout: str, dtype: torch.dtype
) -> None:
    x, weight, bias = inputs((2, 256, 5, 6), (512, 256, *kernel), dtype, "channels_last")
    weight = oracle.laid_out(weight, weight_layout)
    rest = (weight, bias, stride, padding)
    grad = oracle.laid_out(output_like(x, rest), "channels_last")
    assert columns.pays(grad, weight)
    assert not columns.pays(grad.repeat(20, 1, 1, 1), weight)
    exact = torchs(x.double(), (weight.double(), bias.double(), *rest[2:]), grad.double())
    with oracle.poisoned():
        found = ours("native", x, rest, grad)
    oracle.assert_as_exact_as_torch(found, torchs(x, rest, grad), exact)
    names = {name[0] for name in weight._rewardprop_packs._made}
    assert names == {"forward"}


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [48, 64, 96, 128, 144, 160, 240])
def test_a_packed_weight_is_read_as_it_lies(
    channels: int, dtype: torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    """A layout that is not the image's own is changed at every call: ten times the time."""
    for shape in ((16, channels, 4, 4), (2, channels, 8, 8), (1, channels, 22, 20)):
        x, weight, bias = inputs(shape, (channels, channels, 3, 3), dtype, "channels_last")
        rest = (weight, bias, 1, 1)
        grad = oracle.laid_out(output_like(x, rest), "channels_last")
        ours("native", x, rest, grad)
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            ours("native", x, rest, grad)
        lines = capfd.readouterr().out.splitlines()
        done = [line.split(",cpu,")[1].split(",")[0] for line in lines if ",exec,cpu," in line]
        assert done == ["convolution", "deconvolution"]


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 31, 1, 1), "channels_last"),  # whose strides say both layouts
        ((2, 23, 1, 13), "channels_last"),
        ((1, 17, 1, 2**16 + 3), "channels_last"),
        ((3, 29, 1, 1), "a corner"),
        ((2, 19, 7, 5), "every second"),
        ((1, 41, 23, 29), "any stride of the batch"),
    ],
)
def test_single_pixels_many_pixels_and_odd_strides(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    batch, channels, height, width = shape
    x, weight, bias = inputs(shape, (37, channels, 3, 3), dtype)
    if layout == "a corner":
        x = inputs((batch, channels, 5, 5), (1, 1, 1, 1), dtype)[0][:, :, 2:3, 3:4]
    if layout == "every second":
        x = inputs((batch, channels, height, 2 * width), (1, 1, 1, 1), dtype)[0][..., ::2]
    if layout == "any stride of the batch":
        x = x.as_strided(shape, (1, *x.stride()[1:]))
    rest = (weight, bias, 1, 1)
    grad = output_like(x, rest)
    in_float64 = (weight.double(), bias.double(), 1, 1)
    exact = torchs(x.double(), in_float64, grad.double())
    with oracle.poisoned(), ops.backend("native"):
        leaf = x.detach().requires_grad_()
        y = frozen_conv2d(leaf, *rest)
        found = [y.detach(), *torch.autograd.grad(y, leaf, grad)]
    oracle.assert_as_exact_as_torch(found, torchs(x, rest, grad), exact)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_gradcheck_in_float64(groups: int, layout: str) -> None:
    x, weight, bias = inputs((2, 8, 4, 5), (16, 8 // groups, 3, 3), torch.float64, layout)
    assert torch.autograd.gradcheck(
        lambda x: frozen_conv2d(x, weight, bias, (2, 1), 1, 1, groups), x.requires_grad_()
    )


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    x, weight, bias = inputs((3, 64, 17, 13), (96, 64, 3, 3), dtype)
    grad = output_like(x, (weight, bias, 1, 1))
    expected = ours("native", x, (weight, bias, 1, 1), grad)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(34):
                found = ours("native", x, (weight, bias, 1, 1), grad)
                assert all(map(torch.equal, found, expected))
    finally:
        torch.set_num_threads(threads)


@needs_onednn
def test_nan_and_infinity_reach_the_same_pixels() -> None:
    x, weight, bias = inputs()
    x[0, 3, 2, 2], x[1, 5, 0, 6] = float("nan"), float("inf")
    grad = output_like(x, (weight, bias, 1, 1))
    grad[0, 0, 0, 0] = float("nan")
    found, expected = ours("native", x, (weight, bias, 1, 1), grad), None
    expected = torchs(x, (weight, bias, 1, 1), grad)
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs, equal_nan=True)
    weight = weight.clone()
    weight[0, 0, 0, 0] = float("nan")
    for _ in range(2):  # a weight with NaN in it is packed once, like any other
        frozen_conv2d(x, weight, None, 1, 1)
        first = weight._rewardprop_packs
    assert weight._rewardprop_packs is first


# --- what is kept ---


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_the_weight_and_nothing_else(layout: str) -> None:
    x, weight, bias = inputs(layout=layout)
    kept = oracle.kept_for_backward(lambda: frozen_conv2d(x.requires_grad_(), weight, bias, 1, 1))
    assert [tensor.untyped_storage().data_ptr() for tensor in kept] == [
        weight.untyped_storage().data_ptr()
    ]


@needs_onednn
def test_the_backward_copy_is_made_when_a_gradient_comes() -> None:
    x, weight, bias = inputs((2, 32, 5, 7), (32, 32, 3, 3))
    assert packed_bytes([weight]) == 0
    frozen_conv2d(x, weight, bias, 1, 1)
    once = packed_bytes([weight])
    assert once >= weight.nbytes
    frozen_conv2d(x, weight, bias, 1, 1)
    y = frozen_conv2d(x.requires_grad_(), weight, bias, 1, 1)
    assert packed_bytes([weight]) == once
    y.sum().backward()
    assert packed_bytes([weight]) == 2 * once
    drop_packs([weight])
    assert packed_bytes([weight]) == 0


@needs_onednn
def test_a_large_weights_backward_copy_stays_while_gradients_come_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight, bias = inputs((2, 32, 5, 7), (32, 32, 3, 3))

    def gradients(steps: int) -> list[Tensor]:
        """Of a chain with so many steps, and what is packed after each, in `held`."""
        ys = [frozen_conv2d(x.requires_grad_(), weight, bias, 1, 1) for _ in range(steps)]
        held.append(packed_bytes([weight]))
        found = []
        for y in ys:
            found += torch.autograd.grad(y.square().sum(), x)
            held.append(packed_bytes([weight]))
        return found

    held: list[int] = []
    (expected,) = gradients(1)
    drop_packs([weight])
    monkeypatch.setattr(packing, "_LARGE", weight.nbytes)
    held.clear()
    found = gradients(1) + gradients(3) + gradients(1)
    once = held[0]
    assert held == [once, once, once, once, 2 * once, 2 * once, once, once]
    assert all(torch.equal(one, expected) for one in found)
    assert packed_bytes([weight], passing=True) == 0
    gradients(2)
    assert packed_bytes([weight], passing=True) == once
    drop_packs([weight], passing=True)
    assert packed_bytes([weight]) == once


@needs_onednn
def test_a_large_weight_keeps_the_copy_for_one_size_of_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onednn, "images_of_one_layout", lambda weight, shape: tuple(shape))
    few, weight, bias = inputs((2, 32, 5, 7), (32, 32, 3, 3))
    many = torch.cat([few, few, few]).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(packing, "_LARGE", weight.nbytes)

    def kept_after(*images: Tensor) -> list[int]:
        """Whose copies are there: batch sizes."""
        for x in images:
            torch.testing.assert_close(
                frozen_conv2d(x, weight, bias, 1, 1), F.conv2d(x, weight, bias, 1, 1)
            )
        (made,) = weight._rewardprop_packs._made.values()
        return [image[0] for image in made]

    assert kept_after(few) == [2]
    assert kept_after(many, few, many, few) == [2]
    assert kept_after(many, many) == [6]
    assert kept_after(few) == [6]


@needs_onednn
def test_counts_the_bytes_of_a_modules_weights() -> None:
    module = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3)).requires_grad_(False)
    module.to(memory_format=torch.channels_last)
    x = inputs()[0]
    for layer in module:
        frozen_conv2d(x, layer.weight, layer.bias)
    assert packed_bytes(module) == packed_bytes(module.parameters()) >= 2 * 32 * 32 * 9 * 4
    drop_packs(module)
    assert packed_bytes(module) == 0


def _in_place(weight: nn.Parameter) -> None:
    weight.mul_(2)


def _behind_autograds_back(weight: nn.Parameter) -> None:
    weight.data.mul_(2)


def _other_memory(weight: nn.Parameter) -> None:
    weight.data = weight.data * 2


def _other_dtype_and_back(weight: nn.Parameter) -> None:
    weight.data = weight.data.bfloat16()
    weight.data = 2 * weight.data.float()


def _other_layout(weight: nn.Parameter) -> None:
    weight.data = (2 * weight.data).contiguous()


@needs_onednn
@pytest.mark.parametrize(
    "change",
    [_in_place, _behind_autograds_back, _other_memory, _other_dtype_and_back, _other_layout],
)
@torch.no_grad()
def test_a_changed_weight_is_packed_anew(change: Any) -> None:
    x, weight, _ = inputs()
    parameter = nn.Parameter(weight, requires_grad=False)
    with ops.backend("native", strict=True):
        before = frozen_conv2d(x, parameter)
        change(parameter)
        after = frozen_conv2d(x, parameter)
    torch.testing.assert_close(after, F.conv2d(x, parameter))
    assert not torch.equal(before, after)


@needs_onednn
@torch.no_grad()
def test_new_memory_is_noticed_even_where_the_sampled_values_are_the_same() -> None:
    x, weight, _ = inputs()
    parameter = nn.Parameter(weight, requires_grad=False)
    frozen_conv2d(x, parameter)
    changed = parameter.data.clone()
    changed.as_strided((changed.numel(),), (1,))[-1] = 100.0  # between two samples
    parameter.data = changed
    torch.testing.assert_close(frozen_conv2d(x, parameter), F.conv2d(x, parameter))


@needs_onednn
def test_a_weight_changed_between_forward_and_backward_is_an_error() -> None:
    x, weight, _ = inputs()
    y = frozen_conv2d(x.requires_grad_(), weight)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_onednn
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_of_a_weight_pack_for_themselves(copied: Any) -> None:
    x, weight, _ = inputs()
    parameter = nn.Parameter(weight, requires_grad=False)
    y = frozen_conv2d(x, parameter)
    twin = copied(parameter)
    assert packed_bytes([twin]) == 0
    assert torch.equal(frozen_conv2d(x, twin), y)
    with torch.no_grad():
        twin.zero_()
    assert not frozen_conv2d(x, twin).any()
    assert torch.equal(frozen_conv2d(x, parameter), y)


@needs_onednn
def test_packed_copies_go_with_their_weight() -> None:
    import weakref

    x, weight, _ = inputs()
    frozen_conv2d(x, weight)
    packs = weakref.ref(weight._rewardprop_packs)
    del weight
    assert packs() is None


# --- where the packed form runs ---


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "stride", "reason"),
    [
        ((2, 8, 5, 5), (32, 8, 3, 3), 1, "from 16 channels"),
        ((2, 32, 5, 5), (4, 32, 3, 3), 1, "from 16 channels"),
        ((1, 16, 128, 64), (16, 16, 1, 1), 1, "below 8192 pixels, there are 8192"),
    ],
)
@needs_onednn
def test_makes_a_copy_where_it_does_not_pay_only_if_asked(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], stride: int, reason: str
) -> None:
    x, weight, _ = inputs(x_shape, weight_shape)
    arguments = (x, weight, None, [stride] * 2, [0, 0], [1, 1], 1)
    assert native.why_not(*arguments) is None
    assert reason in str(native.why_no_gain(*arguments))
    expected = frozen_conv2d(x, weight, None, stride)
    assert packed_bytes([weight]) == 0
    line = ops.explain(FROZEN_CONV2D, *arguments)
    assert line.startswith("reference (the first that is legal here and pays; not native: legal, ")
    assert reason in line
    with ops.backend("native", strict=True):
        torch.testing.assert_close(frozen_conv2d(x, weight, None, stride), expected)
        assert packed_bytes([weight]) > 0


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "stride", "reason"),
    [
        ((2, 32, 5, 5), (32, 32, 1, 1), 2, "1x1 with a stride"),
        ((0, 32, 5, 5), (32, 32, 1, 1), 1, "there are 0 pixels"),
        ((1, 32, 16, 40), (48, 32, 3, 3), 1, "one float32 image of 20480 numbers"),
    ],
)
@needs_onednn
def test_says_what_it_cannot_convolve(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], stride: int, reason: str
) -> None:
    x, weight, _ = inputs(x_shape, weight_shape)
    found = native.why_not(x, weight, None, [stride] * 2, [0, 0], [1, 1], 1)
    assert found is not None
    assert reason in found
    frozen_conv2d(x, weight, None, stride)
    assert packed_bytes([weight]) == 0


@needs_onednn
def test_for_one_small_image_the_gradient_is_left_to_pytorch_as_the_image_is() -> None:
    """dY may be larger or smaller; it is the numbers of x that PyTorch decides by."""
    for outputs, channels, height, reason in (
        (64, 16, 30, "one float32 image of 15360 numbers"),
        (64, 32, 30, None),
        (16, 64, 30, None),
    ):
        x, weight, _ = inputs((1, channels, height, 32), (outputs, channels, 3, 3))
        grad = output_like(x, (weight, None, 1, 1))
        found = native.why_not(grad, weight, None, [1, 1], [1, 1], [1, 1], 1)
        assert (found is None) == (reason is None)
        assert reason is None or reason in str(found)


@needs_onednn
def test_other_dtypes_groups_and_layouts_take_the_reference() -> None:
    x, weight, _ = inputs()
    rest = ([1, 1], [0, 0], [1, 1])
    assert native.why_not(x, weight, None, *rest, 1) is None
    for arguments, reason in (
        ((x.double(), weight, None, *rest, 1), "it takes float32 and bfloat16"),
        ((x, weight, None, *rest, 2), "2 groups"),
        ((x.contiguous(), weight, None, *rest, 1), "not in channels_last"),
        ((x, weight.repeat(1, 2, 1, 1)[:, ::2], None, *rest, 1), "strided view"),
        ((x.to("meta"), weight, None, *rest, 1), "runs on the CPU"),
    ):
        found = native.why_not(*arguments)
        assert found is not None
        assert reason in found


# --- the boundary ---


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    x, weight, bias = inputs((2, 32, 5, 7), (32, 32, 3, 3), dtype)
    x = oracle.laid_out(x, layout).detach().requires_grad_()
    geometry = ([2, 1], [1, 0], [1, 1], 1)
    torch.library.opcheck(OP, (x, weight, bias, *geometry))
    grad = oracle.laid_out(output_like(x, (weight, bias, (2, 1), (1, 0))), layout).detach()
    torch.library.opcheck(OP_BACKWARD, (grad, weight, list(x.shape), *geometry, True))


def two_layers(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return frozen_conv2d(frozen_conv2d(x, first, padding=1).sin(), second, stride=2).square()


@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_into_one_graph_with_the_same_gradient(dynamic: bool) -> None:
    x, first, _ = inputs((2, 32, 5, 7), (48, 32, 3, 3))
    _, second, _ = inputs((2, 32, 5, 7), (16, 48, 1, 1))
    compiled = torch.compile(two_layers, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x.requires_grad_()
    eager, traced = two_layers(x, first, second), compiled(x, first, second)
    assert torch.equal(traced, eager)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (eager, traced)))


def test_gives_a_gradient_only_where_one_is_asked_for() -> None:
    x, weight, bias = inputs()
    assert not frozen_conv2d(x, weight, bias).requires_grad
    with torch.no_grad():
        assert not frozen_conv2d(x.requires_grad_(), weight, bias).requires_grad


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_result_may_be_written_into(kernel: int) -> None:
    """As that of conv2d; inside, a 1x1 convolution's result is a view of a matrix product's."""
    x, weight, _ = inputs((2, 32, 5, 7), (32, 32, kernel, kernel))
    y = frozen_conv2d(x.requires_grad_(), weight)
    expected = torch.autograd.grad(F.conv2d(x, weight).mul(3).sum(), x)[0]
    y.mul_(3).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


def test_a_second_derivative_is_refused() -> None:
    x, weight, _ = inputs()
    loss = frozen_conv2d(x.requires_grad_(), weight).square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_an_empty_batch_is_no_error() -> None:
    x, weight, bias = inputs((0, 32, 5, 7))
    y = frozen_conv2d(x.requires_grad_(), weight, bias)
    y.sum().backward()
    assert y.shape == (0, 48, 3, 5)
    assert x.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 31, 5, 7)}, r"it must be \(B, 32, H, W\)"),
        ({"x": torch.zeros(32, 5, 7)}, r"x has shape \(32, 5, 7\)"),
        ({"x": torch.zeros(2, 32, 2, 7)}, "smaller than the reach of the weight"),
        ({"x": torch.zeros(2, 32, 5, 7).int()}, "x has dtype torch.int32; allowed are float32"),
        ({"x": torch.zeros(2, 32, 5, 7).half()}, "weight has dtype torch.float32; it must be that"),
        ({"weight": torch.zeros(48, 32, 3)}, r"weight has shape \(48, 32, 3\)"),
        ({"weight": torch.zeros(0, 32, 3, 3)}, "no size 0"),
        ({"weight": torch.zeros(48, 32, 3, 3, device="meta")}, "weight is on meta, x on cpu"),
        ({"weight": torch.zeros(48, 32, 3, 3).requires_grad_()}, "use torch.nn.functional.conv2d"),
        ({"bias": torch.zeros(48).requires_grad_()}, "bias requires a gradient"),
        ({"bias": torch.zeros(47)}, r"bias has shape \(47,\); .* it must be \(48,\)"),
        ({"bias": torch.zeros(48).double()}, "bias has dtype torch.float64"),
        ({"stride": 0}, r"stride is \(0, 0\); it must be at least 1"),
        ({"stride": (1, 2, 3)}, r"stride is \(1, 2, 3\); expected a whole number or two"),
        ({"padding": -1}, r"padding is \(-1, -1\); it must be at least 0"),
        ({"dilation": 0}, r"dilation is \(0, 0\)"),
        ({"groups": 5}, "groups is 5; it must divide the 48 output channels"),
        ({"groups": 2}, r"groups 2 it must be \(B, 64, H, W\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[str, Any], message: str) -> None:
    x, weight, bias = inputs()
    arguments: dict[str, Any] = {"x": x, "weight": weight, "bias": bias, **change}
    with pytest.raises(ValueError, match=message):
        frozen_conv2d(**arguments)


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.zeros(1, 48, 3, 5), r"grad is \(1, 48, 3, 5\) .* it must be \(2, 48, 3, 5\)"),
        (torch.zeros(2, 32, 3, 5), r"grad is \(2, 32, 3, 5\) .* it must be \(2, 48, 3, 5\)"),
        (torch.zeros(2, 48, 5, 7), r"grad is \(2, 48, 5, 7\) .* it must be \(2, 48, 3, 5\)"),
        (torch.zeros(2, 48, 3, 5).bfloat16(), r"grad is .* torch.bfloat16 .* torch.float32"),
        (torch.zeros(2, 48, 3, 5, device="meta"), r"grad is .* on meta; .* on cpu"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused(grad: Tensor, message: str) -> None:
    x, weight, _ = inputs()
    with pytest.raises(ValueError, match=message):
        OP_BACKWARD(grad, weight, list(x.shape), [1, 1], [0, 0], [1, 1], 1, True)
