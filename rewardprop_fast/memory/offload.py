"""What autograd saves goes to host memory and comes back when the backward pass wants it.

    offloader = Offloader(backend, slab_bytes=8 * 2**30)
    with offloader.segment("unet.down_blocks.0"):
        hidden = block(hidden)

Storages are what is moved: several saved views of one storage, of several segments even, are moved
once, and made again with their own sizes and strides. Parameters and views of them never move, nor
what is small. What goes where and when is the scheduler's (`memory.scheduling`). The gradients are
bitwise those without offloading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from rewardprop_fast.memory.scheduling import Backend, Block, Scheduler, Statistics
from rewardprop_fast.memory.scheduling.scheduler import OffloadError, Part
from rewardprop_fast.memory.verify import fingerprint

#: Smaller storages stay unless somebody asks for another border.
LEAST_BYTES = 2**20

#: Storages known at once before those that are gone are looked for; a step has some hundreds.
_MANY = 10_000


class Packed(Protocol):
    """Stands for a saved tensor."""

    def get(self) -> Tensor:
        """It, for the backward pass."""
        ...


class Weights(Protocol):
    """Somebody who moves weights."""

    def saved(self, tensor: Tensor) -> Packed | None:
        """What stands for a weight or a view of one; None for all others."""
        ...


@dataclass(slots=True)
class _Known:
    """A storage that was sent, as long as it or its block is there.

    Attributes:
        reference: weak; as long as it is kept, no other storage gets the same address.
        version: of the values that were sent.
        block: None for memory that stays on the device.
    """

    reference: StorageWeakRef
    version: int
    block: Block | None


class Offloader:
    """Moves saved tensors of segments to the host and back.

    For one thread, and one computation at a time. Inside a backward pass segments do nothing, since
    what is saved there is used at once.

    Args:
        backend: `scheduling.cuda.Cuda`, or `scheduling.double.Double` for tests without a GPU.
        slab_bytes: host memory, allocated once; what does not fit stays on the device.
        least_bytes: smaller storages stay.
        never: modules and tensors whose storages stay besides the parameters that are met.
        window, stash: see `Scheduler`.
        weights: knows where weights are if they move, a `Residency`.
        verify: hash all values on their way out and after they came back; slow.
    """

    def __init__(
        self,
        backend: Backend,
        slab_bytes: int,
        least_bytes: int = LEAST_BYTES,
        never: Iterable[nn.Module | Tensor] = (),
        *,
        window: int = 1,
        stash: int = 1,
        weights: Weights | None = None,
        verify: bool = False,
    ) -> None:
        self.backend, self.least_bytes, self.verify = backend, least_bytes, verify
        self.weights = weights
        self.scheduler = Scheduler(backend, slab_bytes, window, stash)
        self._never = list(never)
        self._staying: dict[int, StorageWeakRef] = {}  # their storages by address
        self._known: dict[int, _Known] = {}
        self._bytes_out = -1  # when it last looked around

    @contextmanager
    def segment(self, name: str) -> Iterator[None]:
        """What autograd saves inside goes to the host, and comes back as one.

        A segment inside another one splits it: what was saved before, inside and after are three.
        """
        if _in_backward():
            with saved_tensors_hooks(_same, _same):
                yield
            return
        if self._is_new_step():
            self._look_around()
        self.scheduler.open(name)
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self.scheduler.close()

    def never(self, *tensors: nn.Module | Tensor) -> None:
        """Let the storages of these stay, too."""
        self._never += tensors
        self._staying |= _storages(tensors)

    def flush(self) -> None:
        """Let go of the device memory of all that was sent: before a phase that needs the room."""
        self.scheduler.flush()

    def reset(self) -> None:
        """Forget everything that is away, after an exception or a step without a backward pass.

        Graphs that are still there cannot run backward any more: they raise an `OffloadError`.
        """
        self.scheduler.reset()
        self._known = {}

    def statistics(self) -> Statistics:
        """What was moved since the offloader was made."""
        return replace(
            self.scheduler.counted,
            peak_host_bytes=self.scheduler.slab.peak,
            stall_seconds=self.backend.stall_seconds,
        )

    # --- autograd's hooks ---

    def _pack(self, tensor: Tensor) -> Packed:
        with torch.no_grad():
            weight = self.weights.saved(tensor) if self.weights is not None else None
            return weight or self._away(tensor) or _Kept(tensor)

    def _away(self, tensor: Tensor) -> _Away | None:
        # other subclasses may be more than their storage
        if type(tensor) not in (Tensor, FakeTensor) or tensor.layout != torch.strided:
            return None
        if isinstance(tensor, nn.Parameter) or not self.backend.takes(tensor):
            return None
        storage = tensor.untyped_storage()
        nbytes, address = storage.nbytes(), storage._cdata
        if nbytes < self.least_bytes or nbytes == 0 or address in self._staying:
            return None
        if isinstance(tensor._base, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad):
            return None
        scheduler = self.scheduler
        part = scheduler.part
        known = self._known.get(address)
        if known is not None and known.version == tensor._version and not known.reference.expired():
            if known.block is None:
                return None
            if not known.block.gone:
                scheduler.hold(known.block)
                return _Away(scheduler, known.block, part, tensor, self.verify)
        title = f"A tensor {tuple(tensor.shape)} of the segment {part.name!r}"
        # detached: a block must not hold the graph that leads to it
        block = scheduler.send(nbytes, tensor.detach(), title)
        self._known[address] = _Known(StorageWeakRef(storage), tensor._version, block)
        if block is None:
            return None
        return _Away(scheduler, block, part, tensor, self.verify)

    def _is_new_step(self) -> bool:
        sent = self.scheduler.counted.bytes_out != self._bytes_out
        return (self.scheduler.is_idle and sent) or len(self._known) > _MANY

    def _look_around(self) -> None:
        """Where the parameters are now; somebody may have moved them between steps."""
        self._bytes_out = self.scheduler.counted.bytes_out
        self._known = {
            address: known
            for address, known in self._known.items()
            if not known.reference.expired()
        }
        self._staying = _storages(self._never)


class _Kept:
    """A saved tensor that stays where it is."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def get(self) -> Tensor:
        # autograd leaves this check to whoever replaces what it saves
        if self.tensor._version != self.version:
            raise OffloadError(
                f"A tensor {tuple(self.tensor.shape)} needed for gradients was modified in place: "
                f"it is at version {self.tensor._version}, expected {self.version}."
            )
        return self.tensor


class _Away:
    """A saved tensor whose storage is away: how to see it in its block."""

    __slots__ = ("_hash", "block", "dtype", "offset", "part", "scheduler", "shape", "stride")

    def __init__(
        self, scheduler: Scheduler, block: Block, part: Part, tensor: Tensor, verify: bool
    ) -> None:
        self.scheduler, self.block, self.part = scheduler, block, part
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.offset, self.dtype = tensor.storage_offset(), tensor.dtype
        self._hash = fingerprint(tensor) if verify else None

    def get(self) -> Tensor:
        with torch.no_grad():
            whole = self.scheduler.need(self.block, self.part).tensor
            assert whole is not None
            if whole.dtype != self.dtype:
                whole = whole.view(self.dtype)
            tensor = whole.as_strided(self.shape, self.stride, self.offset)
            if self._hash is not None and fingerprint(tensor) != self._hash:
                raise OffloadError(
                    f"{self.block.name} came back with other values than it left with "
                    f"(shape {tuple(self.shape)}, {self.dtype})."
                )
            return tensor

    def __del__(self) -> None:
        self.scheduler.let_go(self.block)


def _storages(given: Iterable[nn.Module | Tensor]) -> dict[int, StorageWeakRef]:
    """By address; a storage's address is not given to another as long as its reference is kept."""
    found = {}
    for each in given:
        tensors = [*each.parameters(), *each.buffers()] if isinstance(each, nn.Module) else [each]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            found[storage._cdata] = StorageWeakRef(storage)
    return found


def _unpack(packed: Packed) -> Tensor:
    return packed.get()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
