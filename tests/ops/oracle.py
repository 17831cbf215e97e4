"""What every operator's tests share: other memory layouts, errors against float64, kept memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.ops import native

#: Every way a dense or strided 4-d tensor can lie in memory.
LAYOUTS = ("contiguous", "channels_last", "strided", "expanded")


def native_missing() -> dict[str, Any]:
    """Arguments of ``pytest.mark.skipif`` for tests of the compiled module."""
    why = native.why_missing()
    return {"condition": why is not None, "reason": f"the native module is {why}"}


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in memory as ``layout`` says; "expanded" repeats the first of the batch."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":  # every second element of a larger array
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "expanded" and tensor.shape[0] > 0:
        return tensor[:1].expand(tensor.shape)
    return tensor.contiguous()


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact| in the Frobenius norm, in float64."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_as_exact_as_torch(
    ours: Iterable[Tensor | None],
    torchs: Iterable[Tensor | None],
    exact: Iterable[Tensor | None],
    *,
    unit: float | None = None,
) -> None:
    """Each of ours is at most twice as far from the float64 result as PyTorch's own is.

    Errors below half a unit in the last place of the result's dtype count as none: PyTorch may be
    exact by luck where results are few. ``unit`` names another unit.
    """
    for index, (own, theirs, truth) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert (own is None) == (truth is None) == (theirs is None), index
        if own is None or theirs is None or truth is None:
            continue
        assert own.dtype == theirs.dtype, (index, own.dtype, theirs.dtype)
        assert own.shape == theirs.shape, (index, own.shape, theirs.shape)
        assert torch.isfinite(own).all(), index
        slack = (torch.finfo(own.dtype).eps if unit is None else unit) / 2
        found, allowed = relative_error(own, truth), 2 * relative_error(theirs, truth)
        assert found <= max(allowed, slack), (index, found, allowed)


def assert_as_exact_as_torch_on_average(
    draws: Iterable[tuple[Iterable[Tensor], Iterable[Tensor], Iterable[Tensor]]],
) -> None:
    """The same of root mean squares over several draws of (ours, PyTorch's, exact).

    For results so small that one of PyTorch's may be exact by luck.
    """
    squares = torch.tensor(
        [
            [
                (relative_error(own, truth) ** 2, relative_error(theirs, truth) ** 2)
                for own, theirs, truth in zip(*draw, strict=True)
            ]
            for draw in draws
        ],
        dtype=torch.float64,
    )
    found, theirs = squares.mean(0).sqrt().unbind(-1)
    assert (found <= 2 * theirs).all(), (found, 2 * theirs)


def output_and_gradients(
    function: Callable[..., Tensor], leaves: Iterable[Tensor | None], grad: Tensor | None = None
) -> list[Tensor | None]:
    """function(*leaves) and the gradient of each leaf, for the output's gradient ``grad``."""
    own = [None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    output = function(*own)
    output.backward(torch.ones_like(output) if grad is None else grad.to(output.dtype))
    return [output.detach(), *(None if leaf is None else leaf.grad for leaf in own)]


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is filled with NaN: what an operator leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def kept_for_backward(function: Callable[[], Any]) -> list[Tensor]:
    """The distinct storages that ``function`` keeps for backward, one tensor of each."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    del result
    return list(kept.values())
