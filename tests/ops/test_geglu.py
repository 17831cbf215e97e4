"""GEGLU against diffusers, its formula in float64, PyTorch's own error, and its registration."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.activations import GEGLU as DiffusersGEGLU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewardprop_fast import ops
from rewardprop_fast.ops import native
from rewardprop_fast.ops.geglu import reference
from tests.ops.oracle import (
    assert_as_exact_as_torch,
    kept_for_backward,
    laid_out,
    native_missing,
    output_and_gradients,
    poisoned,
)

OP = torch.ops.rewardprop_fast.geglu.default
OP_BACKWARD = torch.ops.rewardprop_fast.geglu_backward.default

needs_native = pytest.mark.skipif(**native_missing())

FAST = [
    pytest.param("native", torch.float32, marks=needs_native, id="native-float32"),
    pytest.param("native", torch.bfloat16, marks=needs_native, id="native-bfloat16"),
    pytest.param("reference", torch.float32, id="reference-float32"),
    pytest.param("reference", torch.bfloat16, id="reference-bfloat16"),
    pytest.param("reference", torch.float16, id="reference-float16"),
]


def plain(x: Tensor) -> Tensor:
    """As diffusers writes it, in the dtype of x."""
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * torch.nn.functional.gelu(gate)


def on(backend: str) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        with ops.backend(backend, strict=True):
            return ops.geglu(x)

    return function


def assert_as_exact(backend: str, x: Tensor, grad: Tensor) -> None:
    exact = output_and_gradients(plain, [x.double()], grad.double())
    with poisoned():
        ours = output_and_gradients(on(backend), [x], grad)
    assert_as_exact_as_torch(ours, output_and_gradients(plain, [x], grad), exact)


def test_is_diffusers_geglu() -> None:
    module = DiffusersGEGLU(6, 10).double()
    torch.nn.init.eye_(module.proj.weight)
    torch.nn.init.normal_(module.proj.bias)
    x = torch.randn(2, 3, 6).double()
    with torch.no_grad():
        expected = module(x)
        ours = ops.geglu(module.proj(x))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("backend", "dtype"), FAST)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(2, 67, 640), (1, 31, 2 * 1021)])
def test_is_as_near_to_float64_as_pytorch(
    shape: tuple[int, ...], scale: float, backend: str, dtype: torch.dtype
) -> None:
    x = (scale * torch.randn(shape)).to(dtype)
    grad = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    assert_as_exact(backend, x, grad)


@needs_native
@settings(max_examples=50, deadline=None)
@given(
    leading=st.lists(st.integers(1, 7), min_size=0, max_size=3),
    width=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "channels_last", "strided"])] * 2),
)
def test_any_shape_and_layout(
    leading: list[int], width: int, dtype: torch.dtype, layouts: tuple[str, str]
) -> None:
    x = torch.randn(*leading, 2 * width).to(dtype)
    grad = torch.randn(*leading, width).to(dtype)
    strided_x, strided_grad = laid_out(x, layouts[0]), laid_out(grad, layouts[1])
    found = output_and_gradients(on("native"), [strided_x], strided_grad)
    # Every element comes from one pair, so the layout changes no bit.
    flat = [
        on("native")(x),
        OP_BACKWARD(grad, x),
    ]
    for ours, same in zip(found, flat, strict=True):
        assert torch.equal(ours, same)
    exact = output_and_gradients(plain, [x.double()], grad.double())
    for ours, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-2, atol=1e-2)
        if dtype == torch.float32:
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [((1 << 16) + 3, 2), (1, 2 * ((1 << 17) + 1)), (37, 2 * 4801)])
def test_large_arrays_on_several_threads(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Ranges that the threads take begin and end inside rows."""
    x = torch.randn(shape).to(dtype)
    grad = torch.randn(shape[0], shape[1] // 2).to(dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = output_and_gradients(on("native"), [x], grad)
        assert_as_exact("native", x, grad)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            with poisoned():
                several = output_and_gradients(on("native"), [x], grad)
            for ours, same in zip(several, one, strict=True):
                assert torch.equal(ours, same)
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_the_tails_keep_relative_precision() -> None:
    """Where 1 + erf cancels, to e^(-87): the range in which float32 has normal numbers."""
    gate = torch.linspace(-12.9, 12.9, 25801)
    x = torch.stack([torch.ones_like(gate), gate], dim=-1)
    found = on("native")(x).squeeze(-1)
    gate = gate.double()
    exact = gate * torch.special.erfc(-gate / math.sqrt(2)) / 2
    error = ((found.double() - exact) / exact).nan_to_num().abs()
    # e^(-g²/2) has the rounding of g²/2 in its exponent.
    allowed = torch.finfo(torch.float32).eps * (3 + gate.clamp(max=0).square())
    assert (error <= allowed).all()
    assert (on("native")(torch.tensor([[1.0, -1e30], [1.0, 1e30]])) >= 0).all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_and_nan_pass_through(dtype: torch.dtype) -> None:
    """As in float64: PyTorch's vectorised float32 makes gelu(inf) a NaN, its scalar code inf."""
    special = [float("nan"), float("inf"), -float("inf"), 1e18, -1e18, 0.0, 1.0, -3.0]
    hidden, gate = torch.meshgrid(torch.tensor(special), torch.tensor(special), indexing="ij")
    x = torch.cat([hidden, gate], dim=-1).to(dtype)
    for grad in (torch.ones(8, 8, dtype=dtype), hidden.mT.contiguous().to(dtype)):
        found = output_and_gradients(on("native"), [x], grad)
        exact = output_and_gradients(plain, [x.double()], grad.double())
        for ours, truth in zip(found, exact, strict=True):
            torch.testing.assert_close(
                ours, truth.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=1e-37, equal_nan=True
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_computes_in_float32_and_rounds_once(dtype: torch.dtype) -> None:
    x, grad = torch.randn(3, 5, 14).to(dtype), torch.randn(3, 5, 7).to(dtype)
    assert torch.equal(reference.forward(x), plain(x.float()).to(dtype))
    leaf = x.float().requires_grad_()
    plain(leaf).backward(grad.float())
    torch.testing.assert_close(reference.backward(grad, x), leaf.grad.to(dtype))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradcheck_in_float64(backend: str) -> None:
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(on(backend), (x,))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    x = laid_out(torch.randn(2, 3, 5, 8).to(dtype), layout).requires_grad_()
    torch.library.opcheck(OP, (x,))
    grad = laid_out(torch.randn(2, 3, 5, 4).to(dtype), layout)
    torch.library.opcheck(OP_BACKWARD, (grad, x.detach()))
    permuted = torch.randn(3, 8, 5).to(dtype).permute(2, 0, 1)
    torch.library.opcheck(OP, (permuted,))


def test_compiles_into_one_graph_with_the_same_gradient() -> None:
    def network(x: Tensor) -> Tensor:
        return ops.geglu(ops.geglu(x).sin()).square()

    x = torch.randn(3, 5, 16)
    eager = output_and_gradients(network, [x])
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for traced, same in zip(output_and_gradients(compiled, [x]), eager, strict=True):
        assert torch.equal(traced, same)


def test_keeps_the_packed_input_and_nothing_else() -> None:
    x = torch.randn(3, 5, 16, requires_grad=True)
    kept = kept_for_backward(lambda: ops.geglu(x))
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]
    # Also where the kernel needs a contiguous copy: the copy goes, x stays.
    strided = laid_out(torch.randn(3, 5, 16), "strided").requires_grad_()
    kept = kept_for_backward(lambda: ops.geglu(strided))
    assert [tensor.data_ptr() for tensor in kept] == [strided.data_ptr()]


def test_makes_no_node_where_no_gradient_is_asked_for() -> None:
    x = torch.randn(3, 8)
    assert ops.geglu(x).grad_fn is None
    x.requires_grad_()
    with torch.no_grad():
        assert ops.geglu(x).grad_fn is None
    assert ops.geglu(x).grad_fn is not None


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.geglu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_same_a_hundred_times(dtype: torch.dtype) -> None:
    x, grad = torch.randn(5, 2 * 333).to(dtype), torch.randn(5, 333).to(dtype)
    first = output_and_gradients(on("native"), [x], grad)
    for _ in range(100):
        for again, same in zip(output_and_gradients(on("native"), [x], grad), first, strict=True):
            assert torch.equal(again, same)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 3, 0), (0,)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_elements_are_no_error(shape: tuple[int, ...], backend: str) -> None:
    out, grad = output_and_gradients(on(backend), [torch.randn(shape)])
    assert out.shape == (*shape[:-1], shape[-1] // 2)
    assert grad.shape == shape


RESULTS = """
import sys, torch
from rewardprop_fast import ops
from rewardprop_fast.ops import native
x, results = torch.load(sys.argv[1]), []
with ops.backend("native", strict=True):
    for dtype in (torch.float32, torch.bfloat16):
        leaf = x.clone().to(dtype).requires_grad_()
        out = ops.geglu(leaf)
        out.sum().backward()
        results += [out.detach(), leaf.grad]
torch.save((native.module().isa_report()["selected"], results), sys.argv[2])
"""


@needs_native
def test_instruction_sets_agree(tmp_path: Path) -> None:
    """AVX2 and AVX-512 to the last bit; without fused multiply-adds to a rounding or two."""
    x = 3 * torch.randn(23, 2 * 101)
    torch.save(x, tmp_path / "x.pt")
    answers = {}
    for isa in native.module().isa_report()["supported"]:
        files = [str(tmp_path / "x.pt"), str(tmp_path / f"{isa}.pt")]
        environment = {"REWARDPROP_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.run(
            [sys.executable, "-c", RESULTS, *files],
            env={**os.environ, **environment},
            check=True,
            timeout=120,
        )
        selected, answers[isa] = torch.load(files[1])
        assert selected == isa
    if "avx512" in answers:
        assert all(map(torch.equal, answers["avx2"], answers["avx512"]))
    exact = output_and_gradients(plain, [x.double()])
    own = output_and_gradients(plain, [x])
    for results in answers.values():
        assert_as_exact_as_torch(results[:2], own, exact)
        for fast, scalar in zip(results, answers["scalar"], strict=True):
            unit = torch.finfo(fast.dtype).eps
            torch.testing.assert_close(fast, scalar, rtol=4 * unit, atol=4e-7)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 5), r"x has shape \(2, 5\); expected \(\.\.\., 2N\)"),
        (torch.zeros(()), r"x has shape \(\); expected"),
        (torch.zeros(2, 4).int(), r"x has dtype torch.int32; allowed are float32, bfloat16"),
        (torch.zeros(2, 4, dtype=torch.complex64), r"x has dtype torch.complex64"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.geglu(x)


@pytest.mark.parametrize(
    "grad", [torch.zeros(2, 3), torch.zeros(2, 2).double(), torch.zeros(2, 2, device="meta")]
)
def test_a_gradient_that_does_not_fit_is_refused(grad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"grad is .* it must be \(2, 2\) torch.float32 on cpu"):
        OP_BACKWARD(grad, torch.zeros(2, 4))


@needs_native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": -1}, "rows -1 and width 4 are not the sizes of an array"),
        ({"rows": 1 << 62}, "are not the sizes of an array"),
        ({"x": 0}, "x is null"),
        ({"x": 3}, "x is not aligned"),
        ({"dtype": "float16"}, "dtype is 'float16'; allowed are float32"),
    ],
)
def test_the_module_checks_what_it_is_given(changes: dict[str, object], message: str) -> None:
    x, out = torch.zeros(3, 8), torch.zeros(3, 4)
    arguments = {"x": x.data_ptr(), "rows": 3, "width": 4, "dtype": "float32"}
    native.module().geglu(**arguments, out=out.data_ptr())
    for call, rest in (
        (native.module().geglu, {"out": out.data_ptr()}),
        (native.module().geglu_backward, {"grad": out.data_ptr(), "grad_x": x.clone().data_ptr()}),
    ):
        with pytest.raises(ValueError, match=message):
            call(**{**arguments, **rest, **changes})
    with pytest.raises(ValueError, match="out overlaps x"):
        native.module().geglu(**arguments, out=x.data_ptr() + 16)
    with pytest.raises(ValueError, match="grad_x overlaps grad"):
        native.module().geglu_backward(**arguments, grad=out.data_ptr(), grad_x=out.data_ptr())
