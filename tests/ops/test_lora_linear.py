"""`lora_linear` and `lora_linears` against plain PyTorch, float64 and peft."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from rewardprop_fast import ops
from rewardprop_fast.ops import lora_linear, lora_linears
from tests.ops import oracle

OP = torch.ops.rewardprop_fast.lora_linear.default
OP_BACKWARD = torch.ops.rewardprop_fast.lora_linear_backward.default

FAST = ("native",)

#: Triton's interpreter computes in these; bfloat16 is wrong there.
TRITON_DTYPES = (torch.float32, torch.float16)

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """The formula, with autograd's own gradients: all of it in the dtype of x."""
    return F.linear(x, weight, bias) + scale * (x @ lora_a.to(x.dtype).T @ lora_b.to(x.dtype).T)


def inputs(
    rows: tuple[int, ...] = (2, 7),
    k: int = 12,
    n: int = 10,
    rank: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    lora_dtype: torch.dtype | None = None,
    with_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """x, weight, bias, lora_a and lora_b, of sizes that keep y near 1."""
    lora_dtype = lora_dtype or torch.promote_types(dtype, torch.float32)
    return (
        torch.randn(*rows, k).to(dtype),
        (torch.randn(n, k) / k**0.5).to(dtype),
        torch.randn(n).to(dtype) if with_bias else None,
        (torch.randn(rank, k) / k**0.5).to(lora_dtype),
        (torch.randn(n, rank) / rank**0.5).to(lora_dtype),
    )


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def three_ways(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    grad: Tensor | None = None,
    scale: float = 0.7,
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """y and the gradients of x, A and B: of one backend, of PyTorch, exact; and how large the terms
    are whose sums they are."""
    if grad is None:
        grad = torch.randn(*x.shape[:-1], weight.shape[0]).to(x.dtype)

    def layer(function: Any, weight: Tensor | None, bias: Tensor | None) -> Any:
        return lambda x, a, b: function(x, weight, bias, a, b, scale)

    leaves = (x, lora_a, lora_b)
    with ops.backend(backend, strict=True), oracle.poisoned():
        ours = oracle.output_and_gradients(layer(lora_linear, weight, bias), leaves, grad)
    torchs = oracle.output_and_gradients(layer(plain, weight, bias), leaves, grad)
    weight, bias, x, lora_a, lora_b, grad = double(weight, bias, x, lora_a, lora_b, grad)  # type: ignore[assignment]
    leaves = (x, lora_a, lora_b)
    exact = oracle.output_and_gradients(layer(plain, weight, bias), leaves, grad)
    terms = oracle.output_and_gradients(
        layer(plain, weight.abs(), None if bias is None else bias.abs()),
        [leaf.abs() for leaf in leaves],
        grad.abs(),  # type: ignore[union-attr]
    )
    return ours, torchs, exact, terms


@pytest.mark.parametrize("lora_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize(
    ("rows", "k", "n", "rank"),
    [
        ((2, 256), 320, 320, 16),
        ((1, 77), 768, 320, 4),
        ((300,), 64, 512, 128),
        ((61,), 97, 263, 256),
        ((65537,), 8, 8, 3),
    ],
)
def test_is_as_near_to_float64_as_pytorch(
    rows: tuple[int, ...],
    k: int,
    n: int,
    rank: int,
    backend: str,
    dtype: torch.dtype,
    lora_dtype: torch.dtype | None,
) -> None:
    args = inputs(rows, k, n, rank, dtype=dtype, lora_dtype=lora_dtype or dtype)
    ours, torchs, exact, _ = three_ways(backend, *args)
    oracle.assert_as_exact_as_torch(ours, torchs, exact)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(1, 13), max_size=3).map(tuple),
    k=st.integers(1, 67),
    n=st.integers(1, 67),
    rank=st.integers(1, 33),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    backend=st.sampled_from(FAST),
    layouts=st.tuples(*[st.sampled_from(oracle.LAYOUTS)] * 5),
    with_bias=st.booleans(),
)
def test_any_shape_and_strides(
    rows: tuple[int, ...],
    k: int,
    n: int,
    rank: int,
    dtype: torch.dtype,
    backend: str,
    layouts: tuple[str, ...],
    with_bias: bool,
) -> None:
    x, weight, bias, lora_a, lora_b = inputs(rows, k, n, rank, dtype=dtype, with_bias=with_bias)
    grad = torch.randn(*rows, n).to(dtype)
    x, weight, lora_a, lora_b, grad = (
        oracle.laid_out(tensor, layout) if tensor.dim() > 1 else tensor
        for tensor, layout in zip((x, weight, lora_a, lora_b, grad), layouts, strict=True)
    )
    results = three_ways(backend, x, weight, bias, lora_a, lora_b, grad)
    for own, theirs, truth, terms in zip(*results, strict=True):
        assert truth is not None
        assert terms is not None
        # Few numbers may cancel, and PyTorch be exact by luck: then the terms' size is what counts.
        # S, the correction and the sum are rounded one after the other: half a unit each and more.
        unit = 2 * torch.finfo(dtype).eps * float(terms.norm() / truth.norm())
        oracle.assert_as_exact_as_torch([own], [theirs], [truth], unit=unit)


@needs_triton
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 80),
    k=st.integers(1, 70),
    n=st.integers(1, 70),
    rank=st.integers(1, 70),
    dtype=st.sampled_from(TRITON_DTYPES),
    layouts=st.tuples(*[st.sampled_from(oracle.LAYOUTS)] * 5),
    with_bias=st.booleans(),
)
def test_triton_takes_any_shape_and_strides(
    rows: int,
    k: int,
    n: int,
    rank: int,
    dtype: torch.dtype,
    layouts: tuple[str, ...],
    with_bias: bool,
) -> None:
    x, weight, bias, lora_a, lora_b = inputs((rows,), k, n, rank, dtype=dtype, with_bias=with_bias)
    grad = torch.randn(rows, n).to(dtype)
    x, weight, lora_a, lora_b, grad = (
        oracle.laid_out(tensor, layout)
        for tensor, layout in zip((x, weight, lora_a, lora_b, grad), layouts, strict=True)
    )
    results = three_ways("triton", x, weight, bias, lora_a, lora_b, grad)
    for own, theirs, truth, terms in zip(*results, strict=True):
        assert truth is not None
        assert terms is not None
        unit = 2 * torch.finfo(dtype).eps * float(terms.norm() / truth.norm())
        oracle.assert_as_exact_as_torch([own], [theirs], [truth], unit=unit)


#: Rows, K, widths, ranks and dtype: every kernel, and every way to add up dB.
TRITON_LAYERS = {
    "all in one kernel": ((131,), 72, [64], [4], torch.float32),
    "three layers in one kernel": ((2, 67), 48, [64] * 3, [3] * 3, torch.float32),
    "dB with dX": ((150,), 96, [40], [5], torch.float16),
    "dB with dX, three layers": ((150,), 72, [40] * 3, [3] * 3, torch.float16),
    "dB with T, three layers": ((150,), 700, [40] * 3, [3] * 3, torch.float16),
    "layers that differ": ((70,), 48, [64, 64, 32, 32, 32, 7], [4, 4, 5, 5, 5, 1], torch.float32),
    "a rank above 64": ((70,), 96, [80], [100], torch.float32),
    "rank 256": ((35,), 48, [40], [256], torch.float16),
    "a narrow x and a wide y": ((70,), 16, [720], [17], torch.float16),
}


@needs_triton
@pytest.mark.parametrize("layers", TRITON_LAYERS)
@pytest.mark.parametrize("missing", [None, 1])
def test_triton_is_as_near_to_float64_as_pytorch(
    layers: str, missing: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rewardprop_fast.ops.lora_linear import triton_tiles

    # Large tiles also where there are few of them: the interpreter is slow.
    monkeypatch.setattr(triton_tiles, "_BUSY", 1)
    rows, k, widths, ranks, dtype = TRITON_LAYERS[layers]
    if missing is not None and len(widths) == 1:
        pytest.skip("one layer alone has no output that could be unused")
    x = torch.randn(*rows, k).to(dtype)
    parts = [
        inputs((1,), k, n, rank, dtype=dtype, with_bias=n != 32)[1:]
        for n, rank in zip(widths, ranks, strict=True)
    ]
    weights, biases, lora_as, lora_bs = zip(*parts, strict=True)
    scales = [0.5 + 0.25 * index for index in range(len(widths))]
    grads = [torch.randn(*rows, n).to(dtype) for n in widths]

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [
            (leaf if dtype != torch.float64 else leaf.double()).detach().requires_grad_()
            for leaf in (x, *lora_as, *lora_bs)
        ]
        outputs = function(leaves[0], leaves[1 : 1 + len(widths)], leaves[1 + len(widths) :])
        used = [
            (y, grad.to(y.dtype))
            for index, (y, grad) in enumerate(zip(outputs, grads, strict=True))
            if index != missing
        ]
        torch.autograd.backward(*zip(*used, strict=True))
        return [
            *(y.detach() for y in outputs),
            *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves),
        ]

    def ours(x: Tensor, lora_as: list[Tensor], lora_bs: list[Tensor]) -> tuple[Tensor, ...]:
        return lora_linears(x, weights, biases, lora_as, lora_bs, scales)

    def torchs(x: Tensor, lora_as: list[Tensor], lora_bs: list[Tensor]) -> tuple[Tensor, ...]:
        exact = x.dtype == torch.float64
        return tuple(
            plain(x, *(double(w, bias) if exact else (w, bias)), a, b, scale)  # type: ignore[arg-type]
            for w, bias, a, b, scale in zip(weights, biases, lora_as, lora_bs, scales, strict=True)
        )

    with ops.backend("triton", strict=True), oracle.poisoned():
        found = run(ours, dtype)
    oracle.assert_as_exact_as_torch(found, run(torchs, dtype), run(torchs, torch.float64))


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_is_what_peft_computes(backend: str) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(24, 20)}).requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(r=5, lora_alpha=8, target_modules=["layer"], init_lora_weights=False), model
    )
    layer: Any = model["layer"]
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 6, 24, requires_grad=True)
    theirs = layer(x)
    with ops.backend(backend, strict=True):
        ours = lora_linear(x, layer.base_layer.weight, layer.base_layer.bias, lora_a, lora_b, 8 / 5)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(3, 6, 20)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (x, lora_a, lora_b), weight),
        torch.autograd.grad(theirs, (x, lora_a, lora_b), weight),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_several_layers_on_one_x_are_those_layers(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 9, 16).to(dtype)
    layers = [
        inputs((1,), 16, n, rank, dtype=dtype, with_bias=n != 7)[1:]
        for n, rank in ((10, 3), (7, 1), (12, 5))
    ]
    scales = [0.5, 2.0, 1.3]
    grads = [torch.randn(2, 9, n).to(dtype) for n in (10, 7, 12)]
    weights, biases, lora_as, lora_bs = zip(*layers, strict=True)

    def together(x: Tensor, *loras: Tensor) -> tuple[Tensor, ...]:
        return lora_linears(x, weights, biases, loras[:3], loras[3:], scales)

    def one_by_one(x: Tensor, *loras: Tensor) -> tuple[Tensor, ...]:
        own = x.dtype == torch.float64
        parts = zip(weights, biases, loras[:3], loras[3:], scales, strict=True)
        return tuple(
            plain(x, *(double(w, bias) if own else (w, bias)), a, b, s)
            for w, bias, a, b, s in parts
        )

    def run(function: Any, leaves: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        outputs = function(*leaves)
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads)]

    leaves = [x, *lora_as, *lora_bs]
    with ops.backend(backend, strict=True), oracle.poisoned():
        ours = run(together, leaves, grads)
    torchs = run(one_by_one, leaves, grads)
    exact = run(one_by_one, [t.double() for t in leaves], [g.double() for g in grads])
    oracle.assert_as_exact_as_torch(ours, torchs, exact)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_that_is_not_used_has_no_part_in_the_gradients(backend: str, unused: int) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    layers = [inputs((1,), 6, 5, 2)[1:] for _ in range(2)]
    weights, biases, lora_as, lora_bs = zip(*layers, strict=True)
    leaves = [tensor.requires_grad_() for tensor in (*lora_as, *lora_bs)]
    used = 1 - unused
    with ops.backend(backend, strict=True), oracle.poisoned():
        outputs = lora_linears(x, weights, biases, lora_as, lora_bs, [0.5, 0.5])
        outputs[used].sum().backward()
    expected = oracle.output_and_gradients(
        lambda x, a, b: plain(x, weights[used], biases[used], a, b, 0.5),
        (x, lora_as[used], lora_bs[used]),
    )
    torch.testing.assert_close(x.grad, expected[1])
    for index in (unused, used):
        for leaf, truth in ((leaves[index], expected[2]), (leaves[2 + index], expected[3])):
            assert truth is not None
            torch.testing.assert_close(
                leaf.grad, truth if index == used else torch.zeros_like(truth)
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_pointwise_convolution(backend: str, layout: str, dtype: torch.dtype) -> None:
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def draw() -> tuple[list[Tensor], ...]:
        x, weight, bias, lora_a, lora_b = inputs((2 * 5 * 3,), 12, 10, 3, dtype=dtype)
        image = oracle.laid_out(x.reshape(2, 5, 3, 12).permute(0, 3, 1, 2), layout)
        weight, lora_a, lora_b = (matrix[..., None, None] for matrix in (weight, lora_a, lora_b))
        grad = oracle.laid_out(torch.randn(2, 10, 5, 3).to(dtype), layout)

        def convolutions(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            w, bias_ = (weight.to(x.dtype), bias.to(x.dtype))  # type: ignore[union-attr]
            down = F.conv2d(x, a.to(x.dtype))
            return F.conv2d(x, w, bias_) + 0.7 * F.conv2d(down, b.to(x.dtype))

        leaves = (image, lora_a, lora_b)
        with ops.backend(backend, strict=True), oracle.poisoned():
            ours = oracle.output_and_gradients(
                lambda x, a, b: lora_linear(x, weight, bias, a, b, 0.7), leaves, grad
            )
        torchs = oracle.output_and_gradients(convolutions, leaves, grad)
        exact = oracle.output_and_gradients(convolutions, double(*leaves), grad.double())
        assert ours[0] is not None
        assert ours[0].is_contiguous(memory_format=form)
        for own, theirs in zip(ours, torchs, strict=True):
            assert own is not None
            assert theirs is not None
            assert (own.dtype, own.shape) == (theirs.dtype, theirs.shape)
        return ours, torchs, exact  # type: ignore[return-value]

    oracle.assert_as_exact_as_torch_on_average(draw() for _ in range(8))


def test_channels_last_pixels_are_not_copied() -> None:
    x, weight, bias, lora_a, lora_b = inputs((2 * 5 * 3,), 12, 10, 3)
    image = x.reshape(2, 5, 3, 12).permute(0, 3, 1, 2).requires_grad_()
    weight, lora_a, lora_b = (matrix[..., None, None] for matrix in (weight, lora_a, lora_b))
    kept = oracle.kept_for_backward(
        lambda: lora_linear(image, weight, bias, lora_a.requires_grad_(), lora_b, 0.7)
    )
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in kept)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # NumPy's, where infinities meet
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((backend, torch.bfloat16) for backend in (*FAST, "reference")),
        *(pytest.param("triton", dtype, marks=needs_triton) for dtype in TRITON_DTYPES),
    ],
)
@pytest.mark.parametrize("master", [True, False], ids=["float32 adapter", "adapter as x"])
def test_nan_and_infinities_pass_as_in_pytorch(
    master: bool, backend: str, dtype: torch.dtype
) -> None:
    lora_dtype = torch.float32 if master else dtype
    x, weight, bias, lora_a, lora_b = inputs((6,), 8, 9, 2, dtype=dtype, lora_dtype=lora_dtype)
    x[1, 2], x[2, 3], x[3, 4] = float("nan"), float("inf"), -float("inf")
    grad = torch.randn(6, 9).to(dtype)
    grad[4, 0], grad[5, 1] = float("inf"), float("nan")
    with ops.backend(backend, strict=True):
        ours = oracle.output_and_gradients(
            lambda x, a, b: lora_linear(x, weight, bias, a, b, 0.5), (x, lora_a, lora_b), grad
        )
    torchs = oracle.output_and_gradients(
        lambda x, a, b: plain(x, weight, bias, a, b, 0.5), (x, lora_a, lora_b), grad
    )
    for own, theirs in zip(ours, torchs, strict=True):
        assert own is not None
        assert theirs is not None
        assert torch.equal(own.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradcheck_in_float64(backend: str) -> None:
    args = inputs((2, 3), 5, 4, 2, dtype=torch.float64)
    x, weight, bias, lora_a, lora_b = args
    leaves = [tensor.requires_grad_() for tensor in (x, lora_a, lora_b, torch.rand_like(lora_b))]

    def function(x: Tensor, a: Tensor, b: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
        return lora_linears(x, [weight, weight], [bias, None], [a, a], [b, b2], [0.7, 1.3])

    with ops.backend(backend, strict=True):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("layout", ["contiguous", "strided", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    x, weight, bias, lora_a, lora_b = inputs((2, 3), 5, 4, 2, dtype=dtype)
    lora_a = torch.cat([lora_a, lora_a]).requires_grad_()
    joined_b = torch.cat([lora_b.reshape(-1)] * 2).requires_grad_()
    x = oracle.laid_out(x, layout)
    tail = (lora_a, joined_b, [2, 2], [0.5, 1.5])
    torch.library.opcheck(OP, (x.clone().requires_grad_(), [weight] * 2, [bias, None], *tail))
    torch.library.opcheck(
        OP, (x.mT.contiguous().mT.requires_grad_(), [weight] * 2, [bias, None], *tail)
    )
    grads = [oracle.laid_out(torch.randn(2, 3, 4).to(dtype), layout), None]
    s_MR = torch.randn(6, 4).to(dtype)
    tail = (lora_a.detach(), joined_b.detach(), *tail[2:])
    for needed in ([True] * 3, [False, True, False]):
        torch.library.opcheck(OP_BACKWARD, (grads, [weight] * 2, x, s_MR, *tail, [2, 3, 5], needed))


def two_layers(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    first = lora_linear(x, weight, None, a, b, 0.7).sin()
    q, k = lora_linears(first, [weight] * 2, [None] * 2, [a, a], [b, b], [0.5, 1.5])
    return q.square() + k


def test_traces_into_one_graph_with_the_same_gradient() -> None:
    x, weight, _, lora_a, lora_b = inputs((2, 3), 6, 6, 2)
    leaves = [tensor.requires_grad_() for tensor in (x, lora_a, lora_b)]
    eager = two_layers(x, weight, lora_a, lora_b)
    traced = torch.compile(two_layers, fullgraph=True, backend="aot_eager")(
        x, weight, lora_a, lora_b
    )
    assert torch.equal(traced, eager)
    torch.testing.assert_close(
        torch.autograd.grad(traced.sum(), leaves), torch.autograd.grad(eager.sum(), leaves)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_x_and_its_product_with_a_alone(dtype: torch.dtype) -> None:
    x, weight, bias, lora_a, lora_b = inputs((64,), 48, 40, 4, dtype=dtype)

    def kept(*needing: Tensor) -> dict[tuple[int, ...], torch.dtype]:
        for tensor in (x, lora_a, lora_b):
            tensor.requires_grad_(any(tensor is other for other in needing))
        tensors = oracle.kept_for_backward(
            lambda: lora_linear(x, weight, bias, lora_a, lora_b, 0.7)
        )
        network = {tensor.data_ptr() for tensor in (weight, lora_a, lora_b)}
        return {tuple(t.shape): t.dtype for t in tensors if t.data_ptr() not in network}

    assert kept(x, lora_a, lora_b) == {(64, 48): dtype, (64, 4): dtype}
    assert kept(lora_a) == {(64, 48): dtype}
    assert kept(lora_b) == {(64, 4): dtype}
    assert kept(x) == {}


@pytest.mark.parametrize("dispatched", [False, True])
def test_several_adapters_are_kept_as_they_are_not_as_joined(dispatched: bool) -> None:
    """Beside the network's own tensors, x and its product with all A, nothing is kept."""
    x = torch.randn(64, 48, requires_grad=True)
    layers = [inputs((64,), 48, width, 4)[1:] for width in (32, 48, 32)]
    weights, biases, lora_as, lora_bs = (list(part) for part in zip(*layers, strict=True))
    for lora in (*lora_as, *lora_bs):
        lora.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        if not dispatched:
            return lora_linears(x, weights, biases, lora_as, lora_bs, [0.7] * 3)
        parts = [*lora_as, *lora_bs]
        joined = torch.cat(lora_as), torch.cat([lora_b.flatten() for lora_b in lora_bs])
        return tuple(OP(x, weights, biases, *joined, [4] * 3, [0.7] * 3, parts))

    kept = oracle.kept_for_backward(run)
    network = {t.untyped_storage().data_ptr() for t in (x, *weights, *lora_as, *lora_bs)}
    others = [tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in network]
    assert others == [(64, 12)]
    assert len(kept) == len(network) + 1


def test_an_adapter_changed_before_backward_is_noticed() -> None:
    """What is kept is the parameter itself, as PyTorch's own layers keep it."""
    x = torch.randn(8, 6, requires_grad=True)
    shapes = ((5, 6), (2, 6), (5, 2))
    weights, lora_as, lora_bs = ([torch.randn(shape) for _ in range(2)] for shape in shapes)
    for lora in (*lora_as, *lora_bs):
        lora.requires_grad_()
    first, second = lora_linears(x, weights, [None] * 2, lora_as, lora_bs, [1.0] * 2)
    with torch.no_grad():
        lora_as[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first.sum() + second.sum()).backward()


def test_gives_gradients_only_to_what_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewardprop_fast.ops.lora_linear import op

    asked: list[list[bool]] = []
    backward = op._BACKWARD

    def spy(*args: Any) -> Any:
        asked.append(args[-1])
        return backward(*args)

    monkeypatch.setattr(op, "_BACKWARD", spy)
    x, weight, bias, lora_a, lora_b = inputs()
    lora_linear(x, weight, bias, lora_a.requires_grad_(), lora_b, 1.0).sum().backward()
    assert asked == [[False, True, False]]
    assert lora_a.grad is not None
    assert x.grad is None
    assert lora_b.grad is None


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_deterministic(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias, *leaves = inputs((1031,), 96, 80, 7, dtype=dtype)
    grad = torch.randn(1031, 80).to(dtype)

    def run() -> list[Tensor | None]:
        return oracle.output_and_gradients(
            lambda x, a, b: lora_linear(x, weight, bias, a, b, 0.7), (x, *leaves), grad
        )

    with ops.backend(backend, strict=True):
        first = run()
        for _ in range(100):
            for ours, before in zip(run(), first, strict=True):
                assert ours is not None
                assert before is not None
                assert torch.equal(ours, before)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_an_empty_batch_is_no_error(backend: str) -> None:
    x, weight, bias, lora_a, lora_b = inputs((0, 7))
    leaves = [tensor.requires_grad_() for tensor in (x, lora_a, lora_b)]
    with ops.backend(backend, strict=True):
        y = lora_linear(x, weight, bias, lora_a, lora_b, 0.7)
        y.sum().backward()
    assert y.shape == (0, 7, 10)
    assert leaves[0].grad is not None
    assert leaves[0].grad.shape == (0, 7, 12)
    for leaf in leaves[1:]:
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_half_precision_and_float64_run_through_the_reference() -> None:
    for dtype in (torch.float16, torch.float64):
        assert lora_linear(*inputs(dtype=dtype), 0.7).dtype == dtype


def test_a_frozen_weight_is_demanded_only_where_gradients_are_computed() -> None:
    x, weight, bias, lora_a, lora_b = inputs()
    weight.requires_grad_()
    message = r"weight requires a gradient.*freeze it.*or use torch.nn.functional.linear"
    with pytest.raises(ValueError, match=message):
        lora_linear(x, weight, bias, lora_a, lora_b, 1.0)
    with torch.no_grad():
        assert not lora_linear(x, weight, bias, lora_a, lora_b, 1.0).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {0: torch.zeros(2, 7, 11)},
            r"x has shape \(2, 7, 11\).*\(10, 12\) it must be \(\.\.\., 12",
        ),
        (
            {0: torch.zeros(2, 7, 12).int()},
            r"x has dtype torch.int32; allowed are float32, bfloat16",
        ),
        ({1: torch.zeros(10, 12, 2)}, r"weight has shape \(10, 12, 2\); expected \(N, K\)"),
        ({1: torch.zeros(10, 12, 3, 3)}, r"weight has shape .*must be 1x1"),
        ({1: torch.zeros(10, 12).bfloat16()}, r"weight has dtype torch.bfloat16; it must be that"),
        ({2: torch.zeros(12)}, r"bias has shape \(12,\).*it must be \(10,\)"),
        ({2: torch.zeros(10, requires_grad=True)}, r"bias requires a gradient"),
        (
            {3: torch.zeros(4, 12)},
            r"lora_a has shape \(4, 12\).*rank 3 it must be \(R, K\): \(3, 12\)",
        ),
        ({4: torch.zeros(12, 3)}, r"lora_b has shape \(12, 3\).*must be \(N, R\): \(10, 3\)"),
        ({4: torch.zeros(10, 0)}, r"lora_b has shape \(10, 0\); the rank must be at least 1"),
        ({3: torch.zeros(3, 12, 1, 1)}, r"must have as many dimensions as the weight"),
        ({3: torch.zeros(3, 12).half()}, r"lora_a has dtype torch.float16; allowed are that of x"),
        ({4: torch.zeros(10, 3, device="meta")}, r"lora_b is on meta, x on cpu; use one device"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[int, Tensor], message: str) -> None:
    args: list[Any] = list(inputs())
    for position, value in change.items():
        args[position] = value
    with pytest.raises(ValueError, match=message):
        lora_linear(*args, 1.0)


def test_layers_without_their_scale_are_refused_in_words() -> None:
    x, weight, bias, lora_a, lora_b = inputs()
    with pytest.raises(ValueError, match=r"have 1, 1, 1, 1 and 2 entries; expected one of each"):
        lora_linears(x, [weight], [bias], [lora_a], [lora_b], [1.0, 1.0])
    with pytest.raises(ValueError, match="at least one layer"):
        lora_linears(x, [], [], [], [], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(14, 10)}, r"a gradient is \(14, 10\) .* must be \(2, 7, 10\)"),
        (
            {"grad": torch.zeros(2, 7, 10).bfloat16()},
            r"gradient is .* torch.bfloat16 .* torch.float32",
        ),
        ({"x": torch.zeros(2, 6, 12)}, r"x is \(2, 6, 12\) .* it must be \(2, 7, 12\)"),
        ({"x": torch.zeros(2, 7, 12).bfloat16()}, r"x is .* torch.bfloat16 .* torch.float32"),
        ({"s": torch.zeros(14, 2)}, r"s is \(14, 2\) .* it must be \(14, 3\)"),
        ({"s": torch.zeros(14, 3, device="meta")}, r"s is .* on meta; .* on cpu"),
        ({"lora_a": torch.zeros(2, 12)}, r"lora_a has shape \(2, 12\); expected \(3, 12\)"),
        ({"lora_b": torch.zeros(29)}, r"lora_b has shape \(29,\); expected \(30,\)"),
    ],
)
def test_a_backward_pass_of_something_else_is_refused(
    change: dict[str, Tensor], message: str
) -> None:
    x, weight, _, lora_a, lora_b = inputs()
    given = {"grad": torch.zeros(2, 7, 10), "x": x, "s": torch.zeros(14, 3)}
    given |= {"lora_a": lora_a, "lora_b": lora_b.flatten(), **change}
    grad, x, s_MR, lora_a, lora_b = given.values()
    with pytest.raises(ValueError, match=message):
        OP_BACKWARD([grad], [weight], x, s_MR, lora_a, lora_b, [3], [1.0], [2, 7, 12], [True] * 3)
