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

from rewardprop_fast.memory.cuda_peaks import CudaPeaks
from rewardprop_fast.memory.repeating import UNKNOWN, RepeatingFakeMode

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
        device_type: count storages of this device alone; None counts all. With "cuda" the caching
            allocator is asked too, whose peak statistics are reset at the borders of phases.
        watch: also called for every operation: (operation, arguments, keywords, output).
        fake: the mode of the fake tensors of the run, which then takes less time.

    Attributes:
        live_bytes: alive now.
        peak_bytes: most alive at once so far.
        peak_by_phase: the same within each phase.
        cuda: what the caching allocator says of each phase; None unless for "cuda" alone.
    """

    def __init__(
        self,
        root: nn.Module | None = None,
        device_type: str | None = None,
        watch: Callable[[Any, Any, Any, Any], object] | None = None,
        fake: RepeatingFakeMode | None = None,
    ) -> None:
        super().__init__()
        self._fake = fake
        self.live_bytes = self.peak_bytes = self._lap = 0
        self._watch = watch
        self.peak_by_phase: dict[str, int] = {}
        self._names = {} if root is None else {m: name for name, m in root.named_modules()}
        self._device_type = device_type
        self.cuda = CudaPeaks() if device_type == "cuda" else None
        self._holdings: list[Holding] = []  # all that were ever alive, in the order of their making
        self._log: list[int] = []  # i: the i-th became alive, ~i: it was freed
        self._peak_at: dict[str, int] = {}  # phase -> length of the log at its peak
        self._alive: dict[int, int] = {}  # address of the storage object -> index of its holding
        self._deaths: dict[int, weakref.ref[Any]] = {}  # index -> what tells of its end
        self._operators: dict[Any, str] = {}  # operation -> its name
        self._phase = NO_PHASE
        self._modules: list[str] = []
        self._hooks: list[Any] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What becomes alive inside belongs to the phase ``name``; the inner one of two counts."""
        outer = self._phase
        self._enter_phase(name)
        try:
            yield
        finally:
            self._enter_phase(outer)

    @property
    def current_phase(self) -> str:
        """Name of the innermost `phase` block around what runs now."""
        return self._phase

    def count(self, tensors: nn.Module | Iterable[Tensor], holder: str = "") -> int:
        """Count what is there already, a module's weights say; returns the bytes that were new.

        Args:
            holder: what `Holding.module` will be.
        """
        if isinstance(tensors, nn.Module):
            tensors = [*tensors.parameters(), *tensors.buffers()]
        before = self.live_bytes
        self._modules.append(holder)
        for tensor in tensors:
            self._see(tensor, "given")
        self._modules.pop()
        return self.live_bytes - before

    def lap(self) -> int:
        """Most bytes alive at once since the last call."""
        peak, self._lap = self._lap, self.live_bytes
        return peak

    def alive(self) -> list[Holding]:
        """What is alive now, the largest first."""
        return _largest_first(self._holdings[index] for index in self._alive.values())

    def alive_at_peak(self, phase: str | None = None) -> list[Holding]:
        """What was alive when most was, in a phase or in all, the largest first."""
        if phase is None:
            phase = max(self.peak_by_phase, key=self.peak_by_phase.__getitem__, default=NO_PHASE)
        found: dict[int, Holding] = {}
        for entry in self._log[: self._peak_at.get(phase, 0)]:
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

    def counted_as(self, holder: str) -> set[int]:
        """Which of `events` were there already, and were told to `count` under this name."""
        given = ((i, h) for i, h in enumerate(self._holdings) if h.operator == "given")
        return {index for index, holding in given if holding.module == holder}

    @property
    def changes(self) -> int:
        """How many `events` there were so far."""
        return len(self._log)

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
        if self.cuda is not None:
            self.cuda.begin()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.cuda is not None:
            self.cuda.end(self._phase)
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._modules = [], []
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a fake tensor is asked for its device, most often of all
            return func(*args, **kwargs)
        for tensor in _tensors(args):
            self._see(tensor, "given")
        for tensor in _tensors(kwargs.values()):
            self._see(tensor, "given")
        output = UNKNOWN if self._fake is None else self._fake.again(func, args, kwargs)
        if output is UNKNOWN:
            output = func(*args, **kwargs)
        operator = self._operators.get(func)
        if operator is None:
            operator = self._operators[func] = str(func).removesuffix(".default")
        for tensor in _tensors((output,)):
            self._see(tensor, operator)
        if self._watch is not None:
            self._watch(func, args, kwargs, output)
        return output

    def _see(self, tensor: Tensor, operator: str) -> None:
        # a fake tensor's device is another operation: not asked for where all devices count
        if self._device_type is not None and self._device_type != tensor.device.type:
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
        self._deaths[index] = weakref.ref(storage, lambda _: self._freed(address, index))
        self.live_bytes += nbytes
        self._note_peak()

    def _freed(self, address: int, index: int) -> None:
        del self._deaths[index]
        if self._alive.get(address) == index:
            del self._alive[address]
            self._log.append(~index)
            self.live_bytes -= self._holdings[index].nbytes

    def _enter_phase(self, name: str) -> None:
        if self.cuda is not None:
            self.cuda.end(self._phase)
        self._phase = name
        self._note_peak()

    def _note_peak(self) -> None:
        self._lap = max(self._lap, self.live_bytes)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self.live_bytes > self.peak_by_phase.get(self._phase, -1):
            self.peak_by_phase[self._phase] = self.live_bytes
            self._peak_at[self._phase] = len(self._log)

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        own = self._names.get(module)
        self._modules.append((self._modules[-1] if self._modules else "") if own is None else own)

    def _leave_module(self, module: nn.Module, *_: Any) -> None:
        if self._modules:
            self._modules.pop()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among an operation's arguments or results, in lists and mappings too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _largest_first(holdings: Iterable[Holding]) -> list[Holding]:
    return sorted(holdings, key=lambda holding: -holding.nbytes)
