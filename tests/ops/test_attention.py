"""Attention against PyTorch's own, float64 and autograd: every form that runs on a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewardprop_fast import ops
from rewardprop_fast.ops.attention import op
from tests.ops.oracle import (
    LAYOUTS,
    assert_as_exact_as_torch,
    kept_for_backward,
    laid_out,
    poisoned,
    relative_error,
)

OP = torch.ops.rewardprop_fast.attention.default
OP_BACKWARD = torch.ops.rewardprop_fast.attention_backward.default

#: Forms for the CPU, each with the dtypes it takes.
CPU_FORMS = [
    ("native", torch.float32),
    ("native", torch.bfloat16),
    ("sdpa", torch.float32),
    ("sdpa", torch.bfloat16),
    ("reference", torch.float32),
    ("reference", torch.bfloat16),
    ("reference", torch.float16),
]
#: In Triton's interpreter, which is slow.
TRITON_FORMS = [("triton", torch.float32), ("triton", torch.float16)]


def forms(*lists: list[tuple[str, torch.dtype]]) -> Any:
    return pytest.mark.parametrize(("backend", "dtype"), [form for one in lists for form in one])


each_form = forms(CPU_FORMS, TRITON_FORMS)
each_cpu_form = forms(CPU_FORMS)
each_triton_form = forms(TRITON_FORMS)
each_backend = pytest.mark.parametrize("backend", ["native", "sdpa", "reference", "triton"])

#: (B, H, Lq, Lk, D): the bundled model's, SD 1.5's, SDXL's and the VAE's head widths.
SHAPES = [
    (2, 2, 64, 64, 36),
    (1, 2, 64, 20, 36),
    (1, 2, 130, 130, 40),
    (2, 1, 67, 77, 80),
    (1, 1, 33, 77, 160),
    (1, 2, 96, 96, 64),
    (1, 1, 50, 40, 512),
]


def inputs(
    shape: tuple[int, int, int, int, int] = (2, 3, 5, 7, 8),
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v; "channels_last" is what diffusers' processors make: (B, L, H, D) transposed."""
    batch, heads, queries, keys, width = shape
    q, k, v = (
        torch.randn(batch, heads, length, width).to(dtype) for length in (queries, keys, keys)
    )
    return as_laid_out(q, layout), as_laid_out(k, layout), as_laid_out(v, layout)


#: Triton's interpreter computes in numpy, which says so where infinities meet.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def as_laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return laid_out(tensor, layout)


def output_and_gradients(
    function: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor, scale: float
) -> list[Tensor]:
    own = [leaf.detach().requires_grad_() for leaf in leaves]
    output = function(*own, scale=scale)
    return [output.detach(), *torch.autograd.grad(output, own, grad.to(output.dtype))]


def compare(backend: str, leaves: tuple[Tensor, ...], grad: Tensor, scale: float) -> None:
    """O and the three gradients are at most twice as far from float64 as PyTorch's own."""
    with ops.backend(backend, strict=True):
        ours = output_and_gradients(ops.attention, leaves, grad, scale)
    torchs = output_and_gradients(F.scaled_dot_product_attention, leaves, grad, scale)
    in_float64 = tuple(leaf.double() for leaf in leaves)
    exact = output_and_gradients(
        F.scaled_dot_product_attention, in_float64, grad.to(leaves[0].dtype), scale
    )
    assert_as_exact_as_torch(ours, torchs, exact)


@each_form
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_exact_as_pytorch(
    shape: tuple[int, int, int, int, int], backend: str, dtype: torch.dtype
) -> None:
    leaves = inputs(shape, dtype)
    compare(backend, leaves, torch.randn(leaves[0].shape), shape[-1] ** -0.5)


def test_triton_takes_wide_heads_in_float32_a_few_columns_at_a_time() -> None:
    """A width that is no multiple of anything; queries and keys that end within a tile."""
    shape = (1, 1, 35, 18, 261)
    leaves = inputs(shape)
    grad = as_laid_out(torch.randn(leaves[0].shape), "strided")
    compare("triton", leaves, grad, shape[-1] ** -0.5)
    with ops.backend("triton", strict=True):
        out, lse = OP(*leaves, 0.3)
        whole = OP_BACKWARD(grad, *leaves, out, lse, 0.3, [True] * 3)
        for needed in ((False, True, False), (False, False, True)):
            found = OP_BACKWARD(grad, *leaves, out, lse, 0.3, needed)
            for need, gradient, full in zip(needed, found, whole, strict=True):
                assert torch.equal(gradient, full) if need else gradient.numel() == 0


def test_keys_that_fill_up_a_wide_tile_weigh_nothing() -> None:
    """All scores lie far below zero, so that exp(-LSE) is infinite."""
    q, k, v = inputs((1, 1, 9, 5, 260))
    q[..., 0], k[..., 0] = 1.0, -400.0
    grad = torch.randn(q.shape)
    with ops.backend("triton", strict=True):
        ours = output_and_gradients(ops.attention, (q, k, v), grad, 1.0)
    leaves = (q.double(), k.double(), v.double())
    exact = output_and_gradients(F.scaled_dot_product_attention, leaves, grad.double(), 1.0)
    # A score's and the LSE's rounding, half a unit of numbers up to 512 each, and as much again in
    # units of log2 e, are those of a weight.
    for own, truth in zip(ours, exact, strict=True):
        assert relative_error(own, truth) < 4 * 256 * torch.finfo(torch.float32).eps


scales = st.sampled_from([0.0, -0.3, 0.2, 1.0])
four_layouts = st.tuples(*[st.sampled_from(LAYOUTS)] * 4)


@each_cpu_form
@settings(max_examples=25, deadline=None)
@given(st.tuples(*(st.integers(1, n) for n in (3, 3, 41, 90, 70))), four_layouts, scales)
def test_any_shape_and_layout(
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    layouts: tuple[str, ...],
    scale: float,
) -> None:
    check(shape, layouts, scale, backend, dtype)


@each_triton_form
@settings(max_examples=10, deadline=None)
@given(st.tuples(*(st.integers(1, n) for n in (2, 2, 40, 140, 100))), four_layouts, scales)
def test_any_shape_and_layout_in_triton(
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    layouts: tuple[str, ...],
    scale: float,
) -> None:
    check(shape, layouts, scale, backend, dtype)


def check(
    shape: tuple[int, int, int, int, int],
    layouts: tuple[str, ...],
    scale: float,
    backend: str,
    dtype: torch.dtype,
) -> None:
    """O and the three gradients are no further from float64 than rounding explains."""
    q, k, v = (
        as_laid_out(leaf, layout)
        for leaf, layout in zip(inputs(shape, dtype), layouts[:3], strict=True)
    )
    grad = as_laid_out(torch.randn(q.shape).to(dtype), layouts[3])
    with poisoned(), ops.backend(backend, strict=True):
        ours = output_and_gradients(ops.attention, (q, k, v), grad, scale)
    torchs = output_and_gradients(F.scaled_dot_product_attention, (q, k, v), grad, scale)
    leaves = (q.double(), k.double(), v.double())
    exact = output_and_gradients(F.scaled_dot_product_attention, leaves, grad.double(), scale)
    # Few numbers may be exact by luck, and gradients cancel to nothing (a single key): below one
    # unit in the last place of what was summed, an error counts as none.
    for index, size in enumerate(magnitudes(*leaves, grad.double(), scale)):
        assert torch.isfinite(ours[index]).all(), index
        error = (ours[index].double() - exact[index]).norm()
        allowed = 2 * (torchs[index].double() - exact[index]).norm()
        assert error <= max(allowed, torch.finfo(dtype).eps * size.norm()), index


def magnitudes(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    """What O, dQ, dK and dV would be, were nothing to cancel: the measure of rounding errors."""
    lse = torch.logsumexp(scale * q @ k.mT, -1, keepdim=True)
    weights = torch.softmax(scale * q @ k.mT, -1)
    # Weights are e^(score - LSE); both are rounded, the score by the size of its terms.
    weights = weights * (1 + lse.abs() + abs(scale) * q.abs() @ k.abs().mT)
    out = weights @ v.abs()
    delta = (grad.abs() * out).sum(-1, keepdim=True)
    scores = abs(scale) * weights * (grad.abs() @ v.abs().mT + delta)
    return [out, scores @ k.abs(), scores.mT @ q.abs(), weights.mT @ grad.abs()]


@each_triton_form
@pytest.mark.parametrize("shape", [(1, 2, 150, 7, 16), (2, 1, 97, 40, 40)])
def test_the_prompt_gradients_of_several_programs_are_added_up(
    shape: tuple[int, int, int, int, int],
    backend: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More queries than one program takes; float32 sums of them all, in a fixed order."""
    from rewardprop_fast.ops.attention import triton_launch

    monkeypatch.setattr(triton_launch, "_CHUNK_ROWS", 32)
    leaves = inputs(shape, dtype)
    compare(backend, leaves, torch.randn(leaves[0].shape), 0.3)


@each_cpu_form
def test_many_rows(backend: str, dtype: torch.dtype) -> None:
    leaves = inputs((1, 1, 2**16 + 37, 3, 4), dtype)
    compare(backend, leaves, torch.randn(leaves[0].shape), 0.5)


@each_backend
def test_a_batch_of_none_and_no_queries(backend: str) -> None:
    for shape in ((0, 2, 5, 7, 8), (2, 0, 5, 7, 8), (1, 2, 0, 7, 8)):
        q, k, v = (leaf.requires_grad_() for leaf in inputs(shape))
        with ops.backend(backend):
            out = ops.attention(q, k, v)
            gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        assert out.shape == q.shape
        for leaf, gradient in zip((q, k, v), gradients, strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


@each_form
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_nan_and_inf_pass_as_in_pytorch(
    place: str, value: float, backend: str, dtype: torch.dtype
) -> None:
    leaves = dict(zip("qkv", inputs((1, 2, 37, 41, 8), dtype), strict=True))
    leaves[place][0, 1, 3, 2] = value
    q, k, v = leaves.values()
    with ops.backend(backend, strict=True):
        ours = ops.attention(q, k, v).double()
    eager = torch.softmax(q.double() @ k.double().mT * 8**-0.5, -1) @ v.double()
    if backend == "sdpa":  # PyTorch's bfloat16 kernel gives zeros where its plain form gives NaN
        eager = F.scaled_dot_product_attention(q, k, v).double()
    assert torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours.isinf(), eager.isinf())
    finite = eager.isfinite()
    torch.testing.assert_close(
        ours[finite], eager[finite], atol=4 * torch.finfo(dtype).eps, rtol=0, check_dtype=False
    )


@forms([form for form in CPU_FORMS if form[0] != "sdpa"], TRITON_FORMS)
@pytest.mark.parametrize("place", ["q", "k", "v", "grad"])
def test_nan_reaches_the_gradients_that_it_reaches_in_pytorch(
    place: str, backend: str, dtype: torch.dtype
) -> None:
    q, k, v = inputs((1, 2, 37, 41, 8), dtype)
    grad = torch.randn(q.shape).to(dtype)
    {"q": q, "k": k, "v": v, "grad": grad}[place][0, 1, 3, 2] = float("nan")

    def eager(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return torch.softmax(q @ k.mT * scale, -1) @ v

    with ops.backend(backend, strict=True):
        ours = output_and_gradients(ops.attention, (q, k, v), grad, 0.3)
    exact = output_and_gradients(eager, (q.double(), k.double(), v.double()), grad.double(), 0.3)
    for own, truth in zip(ours, exact, strict=True):
        assert torch.equal(own.isnan(), truth.isnan())


@each_form
def test_scores_beyond_half_precision_do_not_overflow(backend: str, dtype: torch.dtype) -> None:
    """A score of 300 * 300 * 8 is more than float16 holds; the scale is 1."""
    q, k, v = inputs((1, 1, 9, 11, 8), dtype)
    with ops.backend(backend, strict=True):
        ours = ops.attention(300 * q, 300 * k, v, scale=1.0)
    exact = F.scaled_dot_product_attention(
        (300 * q).double(), (300 * k).double(), v.double(), scale=1.0
    )
    torch.testing.assert_close(
        ours.double(), exact, atol=2 * torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps
    )


@each_form
@pytest.mark.parametrize("first", [-400.0, -float("inf")])
def test_a_later_key_may_outweigh_all_before_it(
    first: float, backend: str, dtype: torch.dtype
) -> None:
    """By more than an exponential holds, and the first may weigh nothing at all."""
    q, k, v = inputs((1, 2, 37, 300, 8), dtype)
    q[..., 0], k[..., 0] = 1.0, first
    k[..., -5:, 0] = 0.0
    with ops.backend(backend, strict=True):
        ours = ops.attention(q, k, v, scale=1.0)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=1.0)
    assert exact.isfinite().all()
    assert relative_error(ours, exact) < 2 * torch.finfo(dtype).eps


@each_form
@pytest.mark.parametrize("keys", [41, 77])
def test_all_scores_may_lie_far_below_zero(
    keys: int, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exp(-LSE) is infinite then, also for the keys that fill up a tile."""
    if backend == "triton":
        products_round_alike(monkeypatch)
    q, k, v = inputs((1, 2, 37, keys, 8), dtype)
    q[..., 0], k[..., 0] = 1.0, -400.0
    compare(backend, (q, k, v), torch.randn(q.shape), 1.0)


def products_round_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter a product does not depend on the tile, as on tensor cores.

    NumPy's own rounds the same sum in another way for another shape (on a CPU without AVX512): a
    score of -400 then differs between both passes, and its weight with it.
    """
    from triton.runtime import interpreter

    def dot(a: Any, b: Any, d: Any, *_: Any) -> Any:
        with np.errstate(all="ignore"):
            exact = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
        return interpreter.TensorHandle(exact.astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.interpreter_builder, "create_dot", dot, raising=False)


@each_form
@pytest.mark.parametrize("keys", [77, 300])
def test_each_tensor_may_lie_in_memory_in_its_own_way(
    keys: int, backend: str, dtype: torch.dtype
) -> None:
    """Also from tile to tile."""
    q, k, v = inputs((1, 2, 70, keys, 8), dtype)
    leaves = (
        as_laid_out(q, "contiguous"),
        as_laid_out(k, "channels_last"),
        as_laid_out(v, "contiguous"),
    )
    compare(backend, leaves, as_laid_out(torch.randn(q.shape), "strided"), 0.3)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradcheck_in_float64(backend: str) -> None:
    leaves = tuple(leaf.requires_grad_() for leaf in inputs((2, 2, 3, 4, 5), torch.float64))
    with ops.backend(backend, strict=True):
        assert torch.autograd.gradcheck(ops.attention, leaves)


@pytest.mark.parametrize(
    ("layout", "backend", "dtype"),
    [
        ("contiguous", "reference", torch.float32),
        ("channels_last", "native", torch.bfloat16),
        ("strided", "sdpa", torch.float32),
        ("expanded", "native", torch.float32),
    ],
)
def test_opcheck(layout: str, backend: str, dtype: torch.dtype) -> None:
    q, k, v = (as_laid_out(leaf, layout).requires_grad_() for leaf in inputs(dtype=dtype))
    with ops.backend(backend, strict=True):
        torch.library.opcheck(OP, (q, k, v, 0.3))
        with torch.no_grad():
            out, lse = OP(q, k, v, 0.3)
        grad = as_laid_out(torch.randn(q.shape).to(dtype), layout)
        for needed in ((True, True, True), (False, True, False)):
            torch.library.opcheck(
                OP_BACKWARD,
                (grad, q.detach(), k.detach(), v.detach(), out, lse, 0.3, needed),
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_traces_into_one_graph_with_the_same_gradient(dtype: torch.dtype) -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(ops.attention(q, k, v).sin(), k, v, scale=0.7).square()

    leaves = tuple(leaf.requires_grad_() for leaf in inputs(dtype=dtype))
    eager = twice(*leaves)
    traced = torch.compile(twice, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(traced, eager)
    for ours, plain in zip(
        torch.autograd.grad(traced.sum(), leaves),
        torch.autograd.grad(eager.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


@each_form
def test_is_the_same_to_the_last_bit_every_time(backend: str, dtype: torch.dtype) -> None:
    leaves = inputs((1, 2, 65, 77, 40), dtype)
    grad = torch.randn(leaves[0].shape)
    with ops.backend(backend, strict=True):
        first = output_and_gradients(ops.attention, leaves, grad, 0.2)
        for _ in range(2 if backend == "triton" else 100):
            again = output_and_gradients(ops.attention, leaves, grad, 0.2)
            assert all(map(torch.equal, again, first))


@each_form
def test_keeps_its_inputs_its_output_and_one_number_for_each_query(
    backend: str, dtype: torch.dtype
) -> None:
    q, k, v = (leaf.requires_grad_() for leaf in inputs((2, 3, 50, 77, 40), dtype))
    with ops.backend(backend, strict=True):
        kept = kept_for_backward(lambda: ops.attention(q, k, v))
    assert len(kept) == 5
    own = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert own >= {leaf.untyped_storage().data_ptr() for leaf in (q, k, v)}
    lse = 4 * 2 * 3 * 50
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == lse + sum(
        leaf.untyped_storage().nbytes() for leaf in (q, q, k, v)
    )


@each_form
def test_gradients_that_are_not_needed_are_not_made(backend: str, dtype: torch.dtype) -> None:
    q, k, v = inputs((2, 2, 9, 11, 8), dtype)
    grad = torch.randn(q.shape).to(dtype)
    with ops.backend(backend, strict=True):
        out, lse = OP(q, k, v, 0.3)
        whole = OP_BACKWARD(grad, q, k, v, out, lse, 0.3, [True] * 3)
        for needed in itertools.product([False, True], repeat=3):
            found = OP_BACKWARD(grad, q, k, v, out, lse, 0.3, needed)
            for need, gradient, full in zip(needed, found, whole, strict=True):
                assert torch.equal(gradient, full) if need else gradient.numel() == 0
    q.requires_grad_()
    with ops.backend(backend, strict=True):
        ops.attention(q, k, v, scale=0.3).backward(grad)
    assert q.grad is not None
    assert torch.equal(q.grad, whole[0])
    assert k.grad is v.grad is None


@each_form
def test_lse_is_the_logarithm_of_the_sum_of_exponentials(backend: str, dtype: torch.dtype) -> None:
    q, k, v = inputs((2, 3, 33, 77, 40), dtype)
    with ops.backend(backend, strict=True):
        _, lse = OP(q, k, v, 0.3)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    exact = torch.logsumexp(0.3 * q.double() @ k.double().mT, -1)
    # An error here is a relative error of every weight: small beside the dtype's own.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(lse.double(), exact, atol=max(unit / 64, 1e-5), rtol=0)


@each_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_ready_for_the_output_projection(
    layout: str, backend: str, dtype: torch.dtype
) -> None:
    leaves = tuple(as_laid_out(leaf, layout) for leaf in inputs((2, 3, 6, 7, 8), dtype))
    with ops.backend(backend, strict=True):
        results = output_and_gradients(ops.attention, leaves, torch.ones(2, 3, 6, 8), 0.3)
    for result in results:
        assert result.transpose(1, 2).is_contiguous()


def test_views_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor makes of one fused projection: three strided views of one array."""
    seen: list[Tensor] = []
    choose = op.choose

    def spy(operator: Any, *args: Any) -> Any:
        seen.extend(args[:3])
        return choose(operator, *args)

    monkeypatch.setattr(op, "choose", spy)
    packed = torch.randn(2, 9, 3 * 4 * 8)
    views = [part.view(2, 9, 4, 8).transpose(1, 2) for part in packed.chunk(3, -1)]
    out = ops.attention(*views)
    assert [tensor.data_ptr() for tensor in seen] == [view.data_ptr() for view in views]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*views))


def test_a_second_derivative_is_refused() -> None:
    q, k, v = inputs()
    loss = ops.attention(q.requires_grad_(), k, v).square().sum()
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


Q, K = (2, 3, 5, 8), (2, 3, 7, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (Q[1:], K, K, r"q has shape \(3, 5, 8\); expected \(B, H, Lq, D\)"),
        (Q, K[1:], K, r"k has shape \(3, 7, 8\); .* must be \(2, 3, Lk, 8\)"),
        (Q, (1, 3, 7, 8), K, r"k has shape \(1, 3, 7, 8\); .* must be \(2, 3, Lk, 8\)"),
        (Q, K, (2, 1, 7, 8), r"v has shape \(2, 1, 7, 8\); .* must be \(2, 3, Lk, 8\)"),
        (Q, K, (2, 3, 7, 9), r"v has shape \(2, 3, 7, 9\); .* must be \(2, 3, Lk, 8\)"),
        (Q, K, (2, 3, 6, 8), r"k has shape .* and v .*; they must be the same"),
        (Q, (2, 3, 0, 8), (2, 3, 0, 8), r"no keys \(Lk = 0\)"),
        ((1, 1, 2, 513), (1, 1, 2, 513), (1, 1, 2, 513), r"width 513; allowed are 1 to 512"),
        ((1, 1, 2, 0), (1, 1, 2, 0), (1, 1, 2, 0), r"width 0; allowed are 1 to 512"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_words(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ops.attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))


def test_other_dtypes_and_devices_are_refused_in_words() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"q has dtype torch.int32; allowed are float32, bfloat16"):
        ops.attention(q.int(), k.int(), v.int())
    with pytest.raises(ValueError, match=r"k has dtype torch.bfloat16, q has torch.float32"):
        ops.attention(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match="v is on meta, q is on cpu; use one device"):
        ops.attention(q, k, v.to("meta"))
    with pytest.raises(ValueError, match="no keys"):
        OP(q, k[:, :, :0], v[:, :, :0], 0.3)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 3, 6, 8), r"grad is \(2, 3, 6, 8\) .* it must be \(2, 3, 5, 8\)"),
        (
            0,
            torch.zeros(2, 3, 5, 8).double(),
            r"grad is .* torch.float64 .* must be .* torch.float32",
        ),
        (4, torch.zeros(2, 3, 5, 9), r"out is \(2, 3, 5, 9\) .* it must be \(2, 3, 5, 8\)"),
        (5, torch.zeros(2, 3, 4), r"lse is \(2, 3, 4\) .* it must be \(2, 3, 5\) torch.float32"),
        (5, torch.zeros(2, 3, 5).bfloat16(), r"lse is .* it must be \(2, 3, 5\) torch.float32"),
        (5, torch.zeros(2, 3, 5, device="meta"), r"lse is .* on meta; .* on cpu"),
    ],
)
def test_a_backward_pass_of_something_else_is_refused(
    place: int, value: Tensor, message: str
) -> None:
    q, k, v = inputs()
    arguments = [torch.zeros(2, 3, 5, 8), q, k, v, torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5)]
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        OP_BACKWARD(*arguments, 0.3, [True] * 3)
