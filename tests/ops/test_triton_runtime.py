"""Launches are recorded through an operator's public function, on tensors that hold no memory."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardprop_fast.ops import triton_runtime
from rewardprop_fast.ops.registration import define, differentiable


def _kernel(x: Tensor) -> Tensor:
    triton_runtime.launch("doubles", (x.numel(),), {"x": x}, {"FACTOR": 2})
    return torch.empty_like(x)


_DOUBLED = define("doubled_for_a_test(Tensor x) -> Tensor", _kernel, torch.empty_like)
differentiable(_DOUBLED, lambda ctx, args, output: None, lambda ctx, grad: (_DOUBLED(grad),))


def test_the_operator_launches_under_recording_and_only_there() -> None:
    x = torch.empty(3, 5, device="meta", requires_grad=True)
    _DOUBLED(x).sum().backward()  # the fake kernel: nothing is launched, or it would fail
    with triton_runtime.recording((9, 0)) as found:
        output = _DOUBLED(x)
        assert len(found.launches) == 1
        output.backward(torch.empty_like(output))
    assert [launch.grid for launch in found.launches] == [(15,), (15,)]
    first = found.launches[0]
    assert (first.kernel, first.constexprs) == ("doubles", {"FACTOR": 2})
    assert first.arguments["x"].shape == (3, 5)
    assert found.capability == (9, 0)
    assert triton_runtime.capability(x) == triton_runtime.DEFAULT_CAPABILITY


def test_an_empty_grid_launches_nothing() -> None:
    triton_runtime.launch("no kernel at all", (0, 4), {}, {})
