"""Looks at every operation of a step: what a graph could not repeat is refused, the rest written
down or compared with what was written down.

The library's operators count as one operation each, as they do on a GPU, where another kernel runs
than on a CPU; `inside` looks into them as well, which is of use where the reference runs. PyTorch's
own are seen as autograd hands them on (ATen).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from rewardprop_fast.ops.registration import kernel_of
from rewardprop_fast.rollout.graph.backend import CaptureError
from rewardprop_fast.rollout.graph.unet_state import UNetState

_ON_HOST = "it reads a value on the host, which waits for the device"
_DATA_SHAPE = "the shape of its result depends on values, which waits for the device"
_RANDOM = "it draws random numbers, which a replay would not draw as a call does"
_UPLOAD = "it makes a tensor of Python's values, which is an upload from the host"
_AWAY = "it copies between host and device"
_STRANGER = (
    "it reads a tensor that is neither a static input, nor a weight, nor a result of this step, "
    "and that a replay would look for where it was"
)

#: Methods that show the values to Python without a word to the dispatcher.
_REVEALING = frozenset(("item", "tolist", "numpy", "__array__", "cpu"))
_CONVERTING = frozenset(("__bool__", "__float__", "__int__", "__index__", "__complex__"))

_aten = torch.ops.aten
_UPLOADS = (_aten.lift_fresh.default, _aten.lift.default, _aten._pin_memory.default)
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation reads.

    Attributes:
        origin: "input latents", "weight conv_in.weight", or "result 12" of the step's operations.
        address: of inputs and weights; None for results, whose memory is the graph's.
    """

    origin: str
    address: int | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Operation:
    """One call: its name, the tensors it reads, what else it is told, in which form, and where."""

    name: str
    operands: tuple[Operand, ...]
    numbers: str
    form: TreeSpec
    module: str = field(compare=False)


class Watch:
    """One run of a step, seen operation by operation.

    Args:
        inputs: the static buffers by name.
        state: the UNet's tensors, and its modules' names for messages.
        script: what the first run did; None for the first run.
        inside: look into the library's operators.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        state: UNetState,
        script: list[Operation] | None = None,
        *,
        inside: bool = False,
    ) -> None:
        self.modules, self.script, self.inside = state.modules, script, inside
        self.operations: list[Operation] = []
        self._origins: dict[int, tuple[StorageWeakRef, str]] = {}
        self._fixed: set[str] = set()
        self._hidden = False
        for name, tensor in inputs.items():
            self._know(tensor, f"input {name}")
        for name, tensor in zip(state.names(), state.tensors, strict=True):
            self._know(tensor, f"weight {name}")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, everything is looked at. Errors: CaptureError."""
        with _Functions(self), _Dispatch(self):
            yield
        if self.script is not None and len(self.operations) < len(self.script):
            missing = self.script[len(self.operations)]
            raise CaptureError(
                f"The step ended after {len(self.operations)} of {len(self.script)} operations; "
                f"when it was captured, {missing.name} in {missing.module} came next."
            )

    def result(self, output: Tensor) -> None:
        """Refuse an output that is no result of the step."""
        origin = self._origin(output)
        if origin is None or not origin.startswith("result"):
            raise CaptureError(f"The step's output is no result of it but {origin or 'unknown'}.")

    # --- called by the modes ---

    def dispatched(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation that may be captured."""
        reason = _reason(func, args, kwargs)
        if reason is not None:
            self._refuse(str(func), reason)
        self._note(func, args, kwargs)
        kernel = kernel_of(func)
        if kernel is not None and self.inside:
            with _Dispatch(self):
                output = kernel(*args)
        elif kernel is not None:
            self._hidden = True
            try:
                output = func(*args, **kwargs)
            finally:
                self._hidden = False
        else:
            output = func(*args, **kwargs)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and self._origin(leaf) is None:
                self._know(leaf, f"result {len(self.operations) - 1}")
        return output

    def called(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuse what the dispatcher would not hear of on a CPU, where host and device are one."""
        if self._hidden:
            return
        name = getattr(func, "__name__", "")
        if name in _REVEALING or name in _CONVERTING:
            self._refuse(f"Tensor.{name}", _ON_HOST)
        told = (*args, *(kwargs or {}).values())
        if name == "to" and any(isinstance(given, str) and given == "cpu" for given in told):
            self._refuse('Tensor.to("cpu")', _AWAY)

    # ---

    def _note(self, func: Any, args: Any, kwargs: Any) -> None:
        leaves, form = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        operands = tuple(self._operand(tensor, func) for tensor in tensors)
        numbers = ", ".join(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        # asking for the module takes longer than most operations
        module = self._module() if self.script is None else ""
        operation = Operation(str(func), operands, numbers, form, module)
        self._refuse_writing(func, args, kwargs)
        index = len(self.operations)
        self.operations.append(operation)
        if self.script is None:
            return
        then = self.script[index] if index < len(self.script) else None
        if then != operation:
            now = replace(operation, module=self._module())
            raise CaptureError(_difference(index, then, now))

    def _operand(self, tensor: Tensor, func: Any) -> Operand:
        origin = self._origin(tensor)
        if origin is None:
            shape = f"{tuple(tensor.shape)} {tensor.dtype}"
            self._refuse(str(func), f"{_STRANGER} ({shape})")
            raise AssertionError
        address = None if origin.startswith("result") else tensor.data_ptr()
        return Operand(
            origin,
            address,
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
        )

    def _refuse_writing(self, func: Any, args: Any, kwargs: Any) -> None:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(given):
                origin = self._origin(tensor) if isinstance(tensor, Tensor) else None
                if origin is not None and not origin.startswith("result"):
                    self._refuse(
                        str(func), f"it writes to {origin}, so that a replay is not a call"
                    )

    def _know(self, tensor: Tensor, origin: str) -> None:
        storage = tensor.untyped_storage()
        self._origins[storage._cdata] = StorageWeakRef(storage), origin

    def _origin(self, tensor: Tensor) -> str | None:
        known = self._origins.get(tensor.untyped_storage()._cdata)
        return None if known is None or known[0].expired() else known[1]

    def _module(self) -> str:
        """Whose forward is running, by the frames of Python's stack."""
        frame = sys._getframe(1)
        while frame is not None:
            names = frame.f_code.co_varnames
            owner = frame.f_locals["self"] if names and names[0] == "self" else None
            if isinstance(owner, nn.Module) and owner in self.modules:
                return self.modules[owner]
            frame = frame.f_back  # type: ignore[assignment]
        return "the step itself"

    def _refuse(self, operation: str, reason: str) -> None:
        raise CaptureError(
            f"{operation} in {self._module()} cannot be part of a captured step: {reason}. Move it "
            "before the chain and hand its result to the step, or set train.rollout.graphs to off."
        )


class _Dispatch(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.watch.dispatched(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.called(func, args, kwargs)
        return func(*args, **(kwargs or {}))


def _reason(func: Any, args: Any, kwargs: Any) -> str | None:
    """Why an operation cannot be captured, by what PyTorch says of it; None where it can."""
    tags = func.tags
    if torch.Tag.data_dependent_output in tags:
        return _ON_HOST
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if func in _INDEXING:  # tagged like nonzero, which it calls for masks alone
        masks = (torch.bool, torch.uint8)
        if any(isinstance(i, Tensor) and i.dtype in masks for i in args[1]):
            return _DATA_SHAPE
    elif torch.Tag.dynamic_output_shape in tags:
        return _DATA_SHAPE
    if torch.Tag.nondeterministic_seeded in tags and _draws(func, args, kwargs):
        return _RANDOM
    if func in _UPLOADS:
        return _UPLOAD
    devices = {tensor.device.type for tensor in tensors}
    target = kwargs.get("device")
    if target is not None and tensors:
        devices.add(torch.device(target).type)
    return _AWAY if len(devices) > 1 else None


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it does: attention is said to, for a dropout that is nearly always 0."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "p"):
            value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            return bool(value)
    return True


def _difference(index: int, then: Operation | None, now: Operation) -> str:
    start = f"Operation {index} of the step is {now.name} in {now.module}"
    if then is None:
        return f"{start}; when it was captured, the step had ended by then."
    if then.name != now.name:
        return f"{start}; when it was captured, it was {then.name} in {then.module}."
    for before, after in zip(then.operands, now.operands, strict=False):
        if before != after:
            return f"{start} and reads {after}; when it was captured, it read {before}."
    return f"{start} and is told ({now.numbers}); when it was captured, ({then.numbers})."
