"""The compiled module: loaded once, after torch, or the reason it is not there."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from rewardprop_fast.ops import compiled

_NOTE = compiled.note_path("_native")


def module() -> Any:
    """``rewardprop_fast._native``. Raises ImportError with the reason where it cannot be used."""
    native, problem = _load()
    if native is None:
        raise ImportError(f"rewardprop_fast._native is not available: {problem}")
    return native


def why_missing() -> str | None:
    """None where the compiled module can be used, otherwise why not, in words for a person."""
    return _load()[1]


def why_not_cpu(*tensors: torch.Tensor | None) -> str | None:
    """None where the compiled module can run on these tensors' device, otherwise the reason."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            return f"it runs on the CPU, the tensors are on {tensor.device}"
    return why_missing()


@cache
def _load() -> tuple[Any | None, str | None]:
    return compiled.load("_native", _NOTE)
