"""Finding the first operation that computes something else when it is run again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


def fingerprint(tensor: Tensor) -> str:
    """A hash of dtype, shape and every bit of the values; equal for equal values of any strides."""
    values = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    digest = hashlib.blake2b(values.numpy().tobytes(), digest_size=16)
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return digest.hexdigest()


class RecomputeError(RuntimeError):
    """A second run that was not the first one again."""


class DivergenceError(RecomputeError):
    """An operation that gave other values in a second run; names the first such operation."""


@dataclass
class Trace:
    """The operations of one run in order: (name, fingerprint of what it gave)."""

    operations: list[tuple[str, str]] = field(default_factory=list)

    @contextmanager
    def compared(self, title: str) -> Iterator[None]:
        """Compare what runs inside with this trace; a shorter run is no difference.

        Raises:
            DivergenceError: at the first operation that differs.
        """
        with _Watch(_Comparison(self.operations, title)):
            yield


@contextmanager
def traced() -> Iterator[Trace]:
    """Record the operations that run inside the ``with`` block."""
    trace = Trace()
    with _Watch(trace.operations.append):
        yield trace


class _Comparison:
    def __init__(self, expected: list[tuple[str, str]], title: str) -> None:
        self.expected, self.title, self.index = expected, title, 0

    def __call__(self, found: tuple[str, str]) -> None:
        index, self.index = self.index, self.index + 1
        before = self.expected[index] if index < len(self.expected) else ("nothing", "")
        if found == before:
            return
        if found[0] != before[0]:
            what = f"ran {found[0]} where it first ran {before[0]}"
        else:
            what = f"computed other values in {found[0]}"
        raise DivergenceError(
            f"{self.title} {what} (operation {index + 1} of {len(self.expected)}). Its inputs, "
            "weights or settings have changed since its first run, or the operation is not "
            "deterministic."
        )


#: Operations that two equal runs may differ in: autocast casts a weight once, and new memory holds
#: what was there before.
_UNWATCHED = frozenset(
    {
        torch.ops.aten._to_copy,
        torch.ops.aten.empty,
        torch.ops.aten.empty_like,
        torch.ops.aten.empty_strided,
        torch.ops.aten.new_empty,
        torch.ops.aten.new_empty_strided,
    }
)


class _Watch(TorchDispatchMode):
    def __init__(self, report: Any) -> None:
        super().__init__()
        self._report = report

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        # A view computes nothing, and what keeps saved tensors makes some.
        if func.is_view or func.overloadpacket in _UNWATCHED:
            return output
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        with _disable_current_modes():  # of a run around this one, which watches as well
            values = "".join(fingerprint(tensor) for tensor in tensors)
        self._report((str(func).removesuffix(".default"), values))
        return output
