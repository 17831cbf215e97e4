"""What the tests of offloading share: a double of generous size, networks, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rewardprop_fast.memory.scheduling.double import Double

MIB = 2**20


def double(**settings: Any) -> Double:
    """64 MiB on either side, 1 GB/s; `settings` replace some of it."""
    given = {"host_bytes": 64 * MIB, "device_bytes": 64 * MIB}
    given |= {"to_host_bandwidth": 1e9, "to_device_bandwidth": 1e9}
    return Double(**(given | settings))


@contextmanager
def blocks_as_segments(
    blocks: dict[str, nn.Module], segment: Callable[[str], AbstractContextManager[None]]
) -> Iterator[None]:
    """Each of the modules runs its forward inside ``segment(its name)``."""

    def wrap(module: nn.Module, name: str) -> None:
        forward = module.forward

        def inside(*args: Any, **kwargs: Any) -> Any:
            with segment(name):
                return forward(*args, **kwargs)

        module.__dict__["forward"] = inside

    for name, module in blocks.items():
        wrap(module, name)
    try:
        yield
    finally:
        for module in blocks.values():
            del module.__dict__["forward"]


def gradients(loss: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    return [grad.clone() for grad in torch.autograd.grad(loss, of)]


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """To the last bit."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
