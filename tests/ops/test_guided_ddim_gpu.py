"""The guided DDIM step's GPU forms on the CPU: emulated CUDA C++, and Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewardprop_fast import ops
from rewardprop_fast.ops import guided_ddim_step, triton_runtime
from rewardprop_fast.ops.guided_ddim_step import triton
from tests.ops.oracle import laid_out, poisoned

emulated = pytest.mark.emulated_cuda

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(
    shape: tuple[int, ...],
    *,
    guided: bool,
    noisy: bool = False,
    model_dtype: torch.dtype = torch.bfloat16,
    layout: str = "contiguous",
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, float | None, Tensor | None]:
    batch, *rest = shape
    return (
        laid_out(torch.randn((1 + guided) * batch, *rest).to(model_dtype), layout).to(device),
        laid_out(torch.randn(shape), layout).to(device),
        torch.tensor([1.0371, -0.2213, 0.0817], device=device),
        7.5 if guided else None,
        torch.randn(shape, device=device) if noisy else None,
    )


def outputs_and_gradients(backend: str, args: tuple, weight: Tensor) -> list[Tensor]:
    """x_prev and the gradients of model_output and latents, for the loss sum(weight * x_prev)."""
    model_output, latents = args[0].detach().requires_grad_(), args[1].detach().requires_grad_()
    with ops.backend(backend, strict=True), poisoned():
        x_prev = guided_ddim_step(model_output, latents, *args[2:])
        gradients = torch.autograd.grad(x_prev, (model_output, latents), weight)
    return [x_prev.detach(), *gradients]


def assert_same_bits(
    backend: str,
    shape: tuple[int, ...],
    *,
    guided: bool,
    noisy: bool,
    model_dtype: torch.dtype,
    layout: str = "contiguous",
) -> None:
    args = inputs(shape, guided=guided, noisy=noisy, model_dtype=model_dtype, layout=layout)
    weight = torch.randn(shape)
    found = outputs_and_gradients(backend, args, weight)
    plain = outputs_and_gradients("reference", args, weight)
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.equal(ours, theirs)


@emulated
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.tuples(*(st.integers(0 if n == 3 else 1, n) for n in (3, 5, 19, 19))),
    guided=st.booleans(),
    noisy=st.booleans(),
    model_dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
)
def test_cuda_equals_the_reference_bit_by_bit(
    shape: tuple[int, ...], guided: bool, noisy: bool, model_dtype: torch.dtype, layout: str
) -> None:
    assert_same_bits(
        "cuda", shape, guided=guided, noisy=noisy, model_dtype=model_dtype, layout=layout
    )


@needs_triton
@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(*(st.integers(0 if n == 3 else 1, n) for n in (3, 5, 19, 19))),
    guided=st.booleans(),
    noisy=st.booleans(),
    model_dtype=st.sampled_from([torch.float32, torch.float16]),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
)
def test_triton_equals_the_reference_bit_by_bit(
    shape: tuple[int, ...], guided: bool, noisy: bool, model_dtype: torch.dtype, layout: str
) -> None:
    """In the interpreter, which fuses nothing."""
    assert_same_bits(
        "triton", shape, guided=guided, noisy=noisy, model_dtype=model_dtype, layout=layout
    )


@needs_triton
def test_triton_launches_once_each_way_and_for_what_there_is() -> None:
    with triton_runtime.recording() as recording:
        for guided in (False, True):
            args = inputs((2, 4, 8, 8), guided=guided, device="meta")
            assert triton.forward(*args).shape == (2, 4, 8, 8)
            out = triton.backward(args[1], args[2], args[3], torch.bfloat16)
            assert out.shape == args[0].shape
    names = [launch.kernel.__name__ for launch in recording.launches]
    assert names == ["forward_kernel", "backward_kernel"] * 2
    assert [launch.constexprs["GUIDED"] for launch in recording.launches] == [False] * 2 + [
        True
    ] * 2
    assert {launch.grid for launch in recording.launches} == {(1,)}


@emulated
@pytest.mark.races
@pytest.mark.parametrize("count", [4 * 256 * 2 + 4, 257], ids=["packs", "single"])
@pytest.mark.parametrize("model_dtype", DTYPES)
def test_more_than_one_block(count: int, model_dtype: torch.dtype) -> None:
    assert_same_bits("cuda", (1, 1, 1, count), guided=True, noisy=True, model_dtype=model_dtype)


@emulated
def test_cuda_gives_the_same_bits_in_a_hundred_runs() -> None:
    args, weight = inputs((2, 1, 3, 5), guided=True, noisy=True), torch.randn(2, 1, 3, 5)
    first = outputs_and_gradients("cuda", args, weight)
    for _ in range(99):
        assert all(map(torch.equal, outputs_and_gradients("cuda", args, weight), first))


@emulated
@pytest.mark.parametrize("shifted", ["model_output", "latents", "noise", "weight"])
def test_arrays_that_are_not_aligned_to_packs(shifted: str) -> None:
    """A view that begins at an odd element: dense, but no thread may load 16 bytes of it.

    An x86 processor would; UndefinedBehaviorSanitizer, under which this runs too, says so.
    """

    def dense(name: str, batch: int) -> Tensor:
        start = 1 if name == shifted else 0
        return torch.randn(start + batch * 64)[start:].reshape(batch, 1, 8, 8)

    args = (
        dense("model_output", 4),
        dense("latents", 2),
        torch.tensor([1.0, 0.5, 0.1]),
        2.0,
        dense("noise", 2),
    )
    weight = dense("weight", 2)
    found = outputs_and_gradients("cuda", args, weight)
    for ours, theirs in zip(found, outputs_and_gradients("reference", args, weight), strict=True):
        assert torch.equal(ours, theirs)


@emulated
def test_every_float16_is_read_and_written_right() -> None:
    """All 65536 of them through the kernel: to float32 and, as gradients, back."""
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    model_output = halves.view(torch.float16).reshape(1, 1, 256, 256)
    latents, identity = torch.zeros(1, 1, 256, 256), torch.tensor([0.0, 1.0, 0.0])
    backward = torch.ops.rewardprop_fast.guided_ddim_step_backward.default
    with ops.backend("cuda", strict=True):
        wide = guided_ddim_step(model_output, latents, identity, None)
        torch.testing.assert_close(wide, model_output.float(), rtol=0, atol=0, equal_nan=True)
        exact = torch.nextafter(wide, torch.full_like(wide, torch.inf))  # and beside each
        for grad in (wide, exact, wide * 1.00048828125, wide * 1.000244140625):
            narrow = backward(grad, identity, None, torch.float16)
            torch.testing.assert_close(narrow, grad.half(), rtol=0, atol=0, equal_nan=True)
