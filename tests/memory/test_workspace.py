"""Memory that operations use for themselves: by hand, and against real allocations."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rewardprop_fast import ops
from rewardprop_fast.memory import MemoryTracker
from rewardprop_fast.memory.workspace import (
    Workspaces,
    _watched,
    cublas_workspace,
    measure_workspace,
    workspace_of,
)
from rewardprop_fast.ops import triton_runtime

OPS, aten = torch.ops.rewardprop_fast, torch.ops.aten
MIB = 2**20


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


# --- by hand ---


def test_what_needs_nothing_and_what_is_not_known() -> None:
    x = torch.zeros(4, 64)
    assert workspace_of(OPS.geglu.default, (x,), {}) == 0
    assert workspace_of(aten.mm.default, (x, x.T), {}) == 0
    conv = (image(1, 8, 6, 6), image(4, 8, 3, 3), None, [1, 1], [1, 1], [1, 1], 1)
    assert workspace_of(OPS.frozen_conv2d.default, conv, {}) == 0


def test_a_copy_into_another_layout_is_scratch() -> None:
    x = torch.zeros(2, 3, 16, 64)
    strided = x[..., ::2]
    found = workspace_of(OPS.geglu.default, (strided,), {})
    assert found == strided.numel() * 4
    weight = image(4, 8, 3, 3)
    conv = (torch.zeros(1, 8, 6, 6), weight, None, [1, 1], [1, 1], [1, 1], 1)
    assert workspace_of(OPS.frozen_conv2d.default, conv, {}) == 8 * 36 * 4


def test_the_large_image_of_the_upsampling_convolution() -> None:
    x, weight = image(2, 8, 5, 6), image(4, 8, 3, 3)
    large = 2 * 8 * 10 * 12 * 4
    assert workspace_of(OPS.frozen_upsample_conv2d.default, (x, weight, None), {}) == large
    grad = image(2, 4, 10, 12)
    backward = OPS.frozen_upsample_conv2d_backward.default
    assert workspace_of(backward, (grad, weight, True), {}) == large


def test_the_gradient_of_a_convolution_needs_no_x() -> None:
    grad, weight = image(2, 4, 10, 12), image(4, 8, 3, 3)
    args = (grad, weight, [2, 8, 10, 12], [1, 1], [1, 1], [1, 1], 1, True)
    assert workspace_of(OPS.frozen_conv2d_backward.default, args, {}) == 0


def test_attention_s_sums_of_each_query() -> None:
    q, k = torch.zeros(2, 3, 640, 64, dtype=torch.bfloat16), torch.zeros(2, 3, 640, 64)
    k = k.bfloat16()
    lse = torch.zeros(2, 3, 640)
    args = (q, q, k, k, q, lse, 0.1, (True, True, True))
    assert workspace_of(OPS.attention_backward.default, args, {}) == 2 * 3 * 640 * 4


def test_flash_attention_s_float32_gradient_of_q() -> None:
    """500 queries count as 512, widths of 40 as 64."""
    q = torch.zeros(2, 3, 500, 40)
    lse = torch.zeros(2, 3, 500)
    for name in ("flash_attention_backward", "flash_attention_for_cpu_backward"):
        func = getattr(aten, f"_scaled_dot_product_{name}").default
        found = workspace_of(func, (q, q, q, q, q, lse), {})
        assert found == 4 * 2 * 3 * 512 * (64 + 1)


def test_cublas_takes_a_fixed_space_for_each_thread() -> None:
    assert cublas_workspace(86, threads=1) == 8519680  # as memory_snapshot shows it
    assert cublas_workspace(89) == 2 * 8519680
    assert cublas_workspace(90, threads=1) == 32 * MIB


# --- measured ---


def test_measured_is_what_is_gone_when_the_call_returns() -> None:
    def call() -> Tensor:
        a = torch.empty(3 * MIB // 4)
        b = torch.empty(2 * MIB // 4)
        del a
        c = torch.empty(5 * MIB // 4)
        del c
        return b

    assert measure_workspace(call) == 5 * MIB
    assert measure_workspace(lambda: torch.empty(MIB)) == 0


def test_the_specifications_are_as_foretold() -> None:
    """PyTorch's own operations, really run, against the same on "meta"."""
    q, k = torch.randn(1, 2, 96, 16), torch.randn(1, 2, 77, 16)
    out, lse = OPS.attention(q, k, k, 0.25)
    x = torch.randn(2, 8, 16, 16)
    _, mean, rstd = OPS.group_norm_silu(x, None, None, 4, 1e-5, True)
    everything, dx = (True, True, True), [True, False, False]
    for func, args in (
        (OPS.attention.default, (q, k, k, 0.25)),
        (OPS.attention_backward.default, (out, q, k, k, out, lse, 0.25, everything)),
        (OPS.group_norm_silu.default, (x, None, None, 4, 1e-5, True)),
        (OPS.group_norm_silu_backward.default, (x, x, mean, rstd, None, None, True, dx)),
        (OPS.geglu.default, (x,)),
    ):
        with ops.backend("reference", strict=True), torch.no_grad():
            measured = measure_workspace(lambda func=func, args=args: func(*args))  # type: ignore[misc]
            assert workspace_of(func, args, {}) == measured > 0


SHAPES = [(2, 8, 5, 7), (1, 320, 64, 64), (1, 128, 512, 512), (4, 32, 4096)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_s_partial_sums(shape: tuple[int, ...], channels_last: bool) -> None:
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.empty(shape[1], device="meta")
    args = (x, weight, weight, 4, 1e-5, True)
    assert workspace_of(OPS.group_norm_silu.default, args, {}) == between_kernels(
        OPS.group_norm_silu, args
    )
    mean = torch.empty(shape[0], 4, device="meta")
    backward = (x, x, mean, mean, weight, weight, True, (True, False, False))
    assert workspace_of(OPS.group_norm_silu_backward.default, backward, {}) == between_kernels(
        OPS.group_norm_silu_backward, backward
    )


def test_the_gradient_of_a_lora_between_its_kernels() -> None:
    like = partial(torch.empty, device="meta", dtype=torch.bfloat16)
    adapters = (like(16, 640), like(640 * 16), [16], [1.0])
    args = ([like(8192, 640)], [like(640, 640)], like(8192, 640), like(8192, 16), *adapters)
    args = (*args, [8192, 640], [True, True, True])
    found = workspace_of(OPS.lora_linear_backward.default, args, {})
    assert 8192 * 16 * 2 <= found <= between_kernels(OPS.lora_linear_backward, args)


def between_kernels(operator: Any, args: tuple[Any, ...]) -> int:
    """Bytes of all that a pass's kernels are given which is neither argument nor result."""
    with triton_runtime.recording() as recording:
        results = operator(*args)
    outside = {storage(t) for t in tree_leaves((args, results)) if isinstance(t, Tensor)}
    given = (t for launch in recording.launches for t in launch.arguments.values())
    scratch = {storage(t): t.untyped_storage().nbytes() for t in given if isinstance(t, Tensor)}
    return sum(nbytes for key, nbytes in scratch.items() if key not in outside)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def test_an_argument_that_is_read_last_is_none_the_less_given() -> None:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        large = a.new_empty(100)
        del large
        return b + 1

    a, b = torch.zeros(1), torch.zeros(10)
    assert _watched(kernel, (a, b), {}, (8, 6)) == 4 * (100 - 10)


# --- within a dispatch mode ---


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.workspaces = Workspaces()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.found.append(self.workspaces.see(func, args, kwargs))
        return func(*args, **kwargs)


def step(*modes: TorchDispatchMode) -> MemoryTracker:
    """An upsampling convolution, forward and backward, twice."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        tracker = stack.enter_context(MemoryTracker())
        for mode in modes:
            stack.enter_context(mode)
        x, weight = image(1, 4, 8, 8).requires_grad_(), image(4, 4, 3, 3)
        for _ in range(2):
            y = ops.frozen_upsample_conv2d(x, weight)
            y.backward(torch.empty_like(y))
    return tracker


def test_it_can_be_asked_from_within_a_mode_on_fake_tensors() -> None:
    watching = Watching()
    tracker = step(watching)
    large = 4 * 16 * 16 * 4
    assert [found for found in watching.found if found] == [large] * 4
    assert watching.workspaces.peak == large
    assert len(watching.workspaces._known) == 2
    assert tracker.events() == step().events()  # other modes see nothing of the question
