"""Fake tensors for networks that repeat themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch

#: What `RepeatingFakeMode.again` says of a call that has to be worked out.
UNKNOWN = object()


class RepeatingFakeMode(FakeTensorMode):
    """A FakeTensorMode that does not work out again what a call gives that it has seen before.

    For arguments of known shapes, strides, offsets and dtypes the result is made at once: a tensor
    of its own, a view of the first argument, or that argument. torch remembers fake calls too, but
    not those of libraries' operators, and its keys take longer than most operations. Calls with
    tensors that hold a value (no dimension, or not fake), with ``out=``, or whose result depends on
    values go the usual way. For dense tensors of this mode alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ways: dict[tuple[Any, ...], _Way] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for most often of all
        key = _call(func, args, kwargs or {}) if _may_repeat(func) else None
        if key is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        way = self._ways.get(key)
        if way is None:
            output = super().__torch_dispatch__(func, types, args, kwargs)
            self._ways[key] = _way(self, func, args, output)
            return output
        if way is _USUAL:
            return super().__torch_dispatch__(func, types, args, kwargs)
        return way(args)

    def again(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a call gives that was seen before, or `UNKNOWN`.

        For a mode that is asked before this one: on the way here torch's dispatcher takes as long
        as the answer.
        """
        key = _call(func, args, kwargs) if _may_repeat(func) else None
        way = None if key is None else self._ways.get(key)
        if way is None or way is _USUAL:
            return UNKNOWN
        with no_dispatch():
            return way(args)


_DEVICE = torch.ops.prim.device.default

#: From a call's arguments to its result.
_Way = Callable[[tuple[Any, ...]], Any]


def _USUAL(_: tuple[Any, ...]) -> Any:
    raise AssertionError("stands for the way through FakeTensorMode")


@cache
def _may_repeat(func: Any) -> bool:
    """Whether the arguments' shapes say what an operation returns."""
    tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view}
    if tags & set(func.tags):
        return False
    written = [i for i, a in enumerate(func._schema.arguments) if _is_written(a)]
    returned = [_is_written(value) for value in func._schema.returns]
    # nothing is written to, or the first argument is, and returned
    return written == [] if True not in returned else (written, returned) == ([0], [True])


def _is_written(declared: Any) -> bool:
    return declared.alias_info is not None and declared.alias_info.is_write


def _call(func: Any, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """What tells this call from others; None where it is not to be remembered."""
    parts: list[Any] = [func]
    if not _add_parts(parts, args):
        return None
    if kwargs:
        parts += kwargs
        if not _add_parts(parts, kwargs.values()):
            return None
    return tuple(parts)


def _add_parts(parts: list[Any], values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if not isinstance(value, FakeTensor) or not value.shape:
                return False
            parts += (value.shape, value.stride(), value.storage_offset(), value.dtype)
            parts.append(value.fake_device)
        elif isinstance(value, (list, tuple)):
            parts.append(len(value))
            if not _add_parts(parts, value):
                return False
        else:
            parts += (type(value), value)  # 1 == 1.0 == True
    return True


def _way(mode: FakeTensorMode, func: Any, args: Any, output: Any) -> _Way:
    """How to get ``output`` again from arguments like ``args``."""
    if args and output is args[0]:
        return _first
    there = {id(part): part for part in _tensors(args)}
    if isinstance(output, FakeTensor):
        made = _made(mode, func, args, output, there.values())
        return _USUAL if made is None else made
    if type(output) not in (tuple, list):
        return _USUAL
    ways: list[_Way] = []
    for part in output:
        made = _nothing if part is None else None
        if isinstance(part, FakeTensor):
            made = _made(mode, func, args, part, [*there.values()])
            there[id(part)] = part
        if made is None:
            return _USUAL
        ways.append(made)
    return partial(_several, type(output), ways)


def _made(
    mode: FakeTensorMode, func: Any, args: Any, output: FakeTensor, there: Iterable[FakeTensor]
) -> _Way | None:
    if output.layout != torch.strided or not output.shape:
        return None
    storage, meta = output.untyped_storage(), torch.device("meta")
    like = (tuple(output.shape), output.stride())
    if func.is_view:
        if args[0].untyped_storage()._cdata != storage._cdata:
            return None
        return partial(_view, mode, output.dtype, int(output.storage_offset()), *like)
    shares = any(storage._cdata == other.untyped_storage()._cdata for other in there)
    plain = torch.empty_strided(*like, dtype=output.dtype, device=meta)
    if shares or storage.nbytes() != plain.untyped_storage().nbytes():
        return None
    if output.storage_offset():
        return None
    return partial(_new, mode, output.fake_device, output.dtype, *like)


def _tensors(values: Iterable[Any]) -> Iterable[FakeTensor]:
    for value in values:
        if isinstance(value, FakeTensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _first(args: tuple[Any, ...]) -> Any:
    return args[0]


def _nothing(_: tuple[Any, ...]) -> None:
    return None


def _several(kind: type, ways: list[_Way], args: tuple[Any, ...]) -> Any:
    return kind([way(args) for way in ways])


def _new(
    mode: FakeTensorMode,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    _: tuple[Any, ...],
) -> FakeTensor:
    return FakeTensor(mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)


def _view(
    mode: FakeTensorMode,
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    args: tuple[Any, ...],
) -> FakeTensor:
    base = args[0]
    plain = torch.empty(0, dtype=dtype, device="meta")
    plain.set_(base.untyped_storage(), offset, shape, stride)
    return FakeTensor(mode, plain, base.fake_device)
