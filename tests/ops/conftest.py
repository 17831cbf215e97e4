"""Fixtures that several operators' tests share."""

from __future__ import annotations

import os

import pytest
from torch import Tensor

from rewardprop_fast.ops import cuda_module
from tests.ops import emulation


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend "cuda" runs on CPU tensors, by its kernels' emulation."""
    why_not = emulation.why_not()
    if why_not is not None:
        pytest.skip(why_not)
    emulated = emulation.module()

    def only_cpu(*tensors: Tensor | None) -> str | None:
        devices = {tensor.device.type for tensor in tensors if tensor is not None}
        return None if devices == {"cpu"} else "it is emulated on the CPU"

    monkeypatch.setattr(cuda_module, "_load", lambda: (emulated, None))
    monkeypatch.setattr(cuda_module, "why_not", only_cpu)
    monkeypatch.setattr(cuda_module, "where", lambda _: {"device": 0, "stream": 0})


@pytest.fixture(autouse=True)
def _emulated_where_marked(request: pytest.FixtureRequest) -> None:
    """The mark `emulated_cuda` asks for the fixture, also for single parameters of a test."""
    if request.node.get_closest_marker("emulated_cuda") is not None:
        request.getfixturevalue("emulated_cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under a sanitizer (see test_emulation.py) only what is for it."""
    sanitizer = os.environ.get("REWARDPROP_EMULATION")
    if not sanitizer:
        return
    wanted = [
        item
        for item in items
        if item.get_closest_marker("emulated_cuda")
        and (sanitizer != "thread" or item.get_closest_marker("races"))
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted
