"""What tells two calls of an operation apart, as far as costs and sizes go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def signature(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """A key under which what was found of a call can be kept.

    Tensors are their shapes, strides and dtypes. Numbers with a point are left out: they say
    nothing about sizes and may differ at every step.
    """
    return (func, *_parts(args), *kwargs, *_parts(kwargs.values()))


def _parts(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Tensor):
            yield value.shape
            if value.layout == torch.strided:
                yield value.stride()
            yield value.dtype
        elif isinstance(value, (list, tuple)):
            yield (*_parts(value),)
        elif not isinstance(value, float):
            yield value
