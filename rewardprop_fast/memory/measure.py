"""The bytes of live storages during a run: how many, when most, and who made them.

Every operation passes a `MemoryTracker`, which knows each storage once, however many views of it
exist, from the operation that made it until Python and autograd have both let go of it. What an
operation uses for itself and frees before it returns (a convolution's workspace) is not seen, nor
what an allocator rounds up. Storages that were there before are counted from their first use.

It works the same on fake tensors (`torch._subclasses.FakeTensorMode`), which hold no memory.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Phase outside any `MemoryTracker.phase` block.
NO_PHASE = ""


@dataclass(frozen=True)
class Holding:
    """A storage and where it came from.

    Attributes:
        nbytes: its size.
        phase: the `MemoryTracker.phase` block in which it was made.
        module: dotted name of the innermost module whose forward made it; "" outside any.
        operator: the operation, "aten.convolution"; "given" for what was there before.
        shape, dtype: of the tensor by which it was first seen.
    """

    nbytes: int
    phase: str
    module: str
    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class MemoryTracker(TorchDispatchMode):
    """Counts live storages while it is entered (``with MemoryTracker(unet) as tracker: ...``).

    Args:
        root: a module whose submodules' names tell where a storage was made.
        device_type: count storages of this device alone, "cuda" say; None counts all.
        watch: also called for every operation: (operation, arguments, keywords, output).

    Attributes:
        live_bytes: alive now.
        peak_bytes: most alive at once so far.
        peak_by_phase: the same within each phase.
    """

    def __init__(
        self,
        root: nn.Module | None = None,
        device_type: str | None = None,
        watch: Callable[[Any, Any, Any, Any], object] | None = None,
    ) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self._lap = 0
        self._watch = watch
        self.peak_by_phase: dict[str, int] = {}
        self._names = {} if root is None else {m: name for name, m in root.named_modules()}
        self._device_type = device_type
        self._holdings: list[Holding] = []  # all that were ever alive, in the order of their making
        self._log: list[int] = []  # i: the i-th became alive, ~i: it was freed
        self._peak_at = 0  # length of the log at the peak
        self._alive: dict[int, int] = {}  # address of the storage object -> index of its holding
        self._phase = NO_PHASE
        self._modules: list[str] = []
        self._hooks: list[Any] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What becomes alive inside belongs to the phase ``name``; the inner one of two counts."""
        outer, self._phase = self._phase, name
        self._note_peak()
        try:
            yield
        finally:
            self._phase = outer
            self._note_peak()

    def count(self, tensors: nn.Module | Iterable[Tensor]) -> int:
        """Count what is there already, a module's weights say; returns the bytes that were new."""
        if isinstance(tensors, nn.Module):
            tensors = [*tensors.parameters(), *tensors.buffers()]
        before = self.live_bytes
        for tensor in tensors:
            self._see(tensor, "given")
        return self.live_bytes - before

    def lap(self) -> int:
        """Most bytes alive at once since the last call."""
        peak, self._lap = self._lap, self.live_bytes
        return peak

    def alive(self) -> list[Holding]:
        """What is alive now, the largest first."""
        return _largest_first(self._holdings[index] for index in self._alive.values())

    def alive_at_peak(self) -> list[Holding]:
        """What was alive when most was, the largest first."""
        found: dict[int, Holding] = {}
        for entry in self._log[: self._peak_at]:
            if entry >= 0:
                found[entry] = self._holdings[entry]
            else:
                del found[~entry]
        return _largest_first(found.values())

    def events(self) -> list[tuple[int, int]]:
        """What became alive and was freed, in order: (which, bytes) and later (which, -bytes).

        What an allocator would have to give: `memory.allocator.replay` takes it.
        """
        sizes = [holding.nbytes for holding in self._holdings]
        return [(i, sizes[i]) if i >= 0 else (~i, -sizes[~i]) for i in self._log]

    def at_peak_by(self, key: str) -> dict[str, int]:
        """Bytes alive at the peak by one attribute of `Holding` ("module", "phase", "operator")."""
        totals: Counter[str] = Counter()
        for holding in self.alive_at_peak():
            totals[str(getattr(holding, key))] += holding.nbytes
        return dict(totals.most_common())

    # --- the machinery ---

    def __enter__(self) -> MemoryTracker:
        if self._names:
            hooks = torch.nn.modules.module
            self._hooks = [
                hooks.register_module_forward_pre_hook(self._enter_module),
                hooks.register_module_forward_hook(self._leave_module, always_call=True),
            ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._modules = [], []
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._see(leaf, "given")
        output = func(*args, **kwargs)
        operator = str(func).removesuffix(".default")
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._see(leaf, operator)
        if self._watch is not None:
            self._watch(func, args, kwargs, output)
        return output

    def _see(self, tensor: Tensor, operator: str) -> None:
        if self._device_type not in (None, tensor.device.type):
            return
        if tensor.layout != torch.strided:  # oneDNN's packed layouts show no storage
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        index, nbytes = len(self._holdings), storage.nbytes()
        where = self._modules[-1] if self._modules else ""
        shape = tuple(int(size) for size in tensor.shape)
        self._holdings.append(Holding(nbytes, self._phase, where, operator, shape, tensor.dtype))
        self._alive[address] = index
        self._log.append(index)
        weakref.finalize(storage, self._freed, address, index).atexit = False
        self.live_bytes += nbytes
        self._note_peak()

    def _freed(self, address: int, index: int) -> None:
        if self._alive.get(address) == index:
            del self._alive[address]
            self._log.append(~index)
            self.live_bytes -= self._holdings[index].nbytes

    def _note_peak(self) -> None:
        self._lap = max(self._lap, self.live_bytes)
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self._peak_at = self.live_bytes, len(self._log)
        if self.live_bytes > self.peak_by_phase.get(self._phase, -1):
            self.peak_by_phase[self._phase] = self.live_bytes

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        own = self._names.get(module)
        self._modules.append((self._modules[-1] if self._modules else "") if own is None else own)

    def _leave_module(self, module: nn.Module, *_: Any) -> None:
        if self._modules:
            self._modules.pop()


def _largest_first(holdings: Iterable[Holding]) -> list[Holding]:
    return sorted(holdings, key=lambda holding: -holding.nbytes)
