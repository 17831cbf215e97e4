"""GEGLU's GPU forms on the CPU: emulated CUDA C++, and Triton's interpreter."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewardprop_fast import ops
from rewardprop_fast.ops import triton_runtime
from rewardprop_fast.ops.geglu import triton
from tests.ops.oracle import (
    assert_as_exact_as_torch,
    laid_out,
    output_and_gradients,
    poisoned,
)

emulated = pytest.mark.emulated_cuda
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

#: Triton's interpreter has no bfloat16.
FORMS = [
    *(pytest.param("cuda", d, marks=emulated) for d in (torch.float32, torch.float16)),
    pytest.param("cuda", torch.bfloat16, marks=emulated),
    *(pytest.param("triton", d, marks=needs_triton) for d in (torch.float32, torch.float16)),
]


def plain(x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * torch.nn.functional.gelu(gate)


def run(backend: str, x: Tensor, grad: Tensor) -> list[Tensor | None]:
    """out and the gradient of x; new memory begins as NaN."""
    with ops.backend(backend, strict=True), poisoned():
        return output_and_gradients(ops.geglu, [x], grad)


def assert_as_exact(backend: str, x: Tensor, grad: Tensor) -> None:
    exact = output_and_gradients(plain, [x.double()], grad.double())
    assert_as_exact_as_torch(run(backend, x, grad), output_and_gradients(plain, [x], grad), exact)


@pytest.mark.parametrize(("backend", "dtype"), FORMS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(2, 7, 640), (1, 5, 2 * 331)])
def test_is_as_near_to_float64_as_pytorch(
    shape: tuple[int, ...], scale: float, backend: str, dtype: torch.dtype
) -> None:
    x = (scale * torch.randn(shape)).to(dtype)
    assert_as_exact(backend, x, torch.randn(*shape[:-1], shape[-1] // 2).to(dtype))


@pytest.mark.parametrize(("backend", "dtype"), FORMS)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    leading=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    width=st.sampled_from([0, 1, 2, 3, 7, 8, 24, 64, 127, 136, 257]),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
)
def test_any_shape_and_layout(
    backend: str, dtype: torch.dtype, leading: list[int], width: int, layout: str
) -> None:
    x, grad = torch.randn(*leading, 2 * width).to(dtype), torch.randn(*leading, width).to(dtype)
    found = run(backend, laid_out(x, layout), laid_out(grad, layout))
    exact = output_and_gradients(plain, [x.float()], grad.float())
    for ours, truth in zip(found, exact, strict=True):
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, truth.to(dtype), rtol=2 * unit, atol=2e-6)


@emulated
@pytest.mark.races
@pytest.mark.parametrize("shape", [(3, 2 * 1024), (5, 2 * 61)], ids=["packs", "single"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_more_than_one_block(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_as_exact("cuda", torch.randn(shape).to(dtype), torch.randn(shape)[:, ::2].to(dtype))


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_gives_the_same_bits_in_a_hundred_runs(dtype: torch.dtype) -> None:
    x, grad = torch.randn(3, 2 * 17).to(dtype), torch.randn(3, 17).to(dtype)
    first = run("cuda", x, grad)
    for _ in range(99):
        assert all(map(torch.equal, run("cuda", x, grad), first))


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_arrays_that_are_not_aligned_to_packs(dtype: torch.dtype) -> None:
    """Views that begin at an odd element: dense, but no thread may load 16 bytes of them."""
    x = torch.randn(1 + 3 * 64).to(dtype)[1:].reshape(3, 64)
    aligned = torch.randn(3, 32).to(dtype)
    assert_as_exact("cuda", x, aligned)
    grad = torch.randn(1 + 3 * 32).to(dtype)[1:].reshape(3, 32)
    assert_as_exact("cuda", x.clone(), grad)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's, of inf * 0
@pytest.mark.parametrize(("backend", "dtype"), FORMS)
def test_infinities_and_nan_pass_through(backend: str, dtype: torch.dtype) -> None:
    special = [float("nan"), float("inf"), -float("inf"), 8.0, -100.0, 0.0, 1.0, -3.0]
    hidden, gate = torch.meshgrid(torch.tensor(special), torch.tensor(special), indexing="ij")
    x = torch.cat([hidden, gate], dim=-1).to(dtype)
    grad = hidden.mT.contiguous().to(dtype)
    exact = output_and_gradients(plain, [x.double()], grad.double())
    for ours, truth in zip(run(backend, x, grad), exact, strict=True):
        torch.testing.assert_close(
            ours, truth.to(dtype), rtol=4e-6 + 2 * torch.finfo(dtype).eps, atol=1e-5, equal_nan=True
        )


@needs_triton
@pytest.mark.parametrize("width", [1, 40, 1280, 2560, 5120, 1021])
def test_triton_covers_every_element_once(width: int) -> None:
    """Tiles of a grid, counted: none too few, none too many."""
    from rewardprop_fast.ops.geglu.triton_kernels import tile_shape

    block_m, block_n = tile_shape(width)
    with triton_runtime.recording() as recording:
        out = triton.forward(torch.empty(3, 50, 2 * width, dtype=torch.bfloat16, device="meta"))
        grad_x = triton.backward(out, out.new_empty(3, 50, 2 * width))
    assert grad_x.shape == (3, 50, 2 * width)
    tiles = math.ceil(150 / block_m) * math.ceil(width / block_n)
    assert [launch.grid for launch in recording.launches] == [(tiles,)] * 2
    # Of a row that is no power of two, less than a tenth lies idle where it is wide.
    if width > 1000:
        assert math.ceil(width / block_n) * block_n < 1.13 * width
