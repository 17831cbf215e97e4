"""What a scheduler asks of a device: streams, events, one host slab, copies in both directions.

Three streams run beside each other, each in the order of what it was given: the computation, the
copies to the host and the copies back. Nothing orders one behind another but an event recorded on
the one and waited for on the other. Memory that is dropped may be given to whatever the computation
does next, so everything that still touches it must be ordered before that.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

COMPUTE, OUT, BACK = 0, 1, 2
STREAMS = ("compute", "out", "back")

#: A point in a stream's queue; what it is depends on the backend.
Event: TypeAlias = Any


class Buffer:
    """Device memory that a scheduler holds.

    Attributes:
        nbytes: its size.
        tensor: over it; None where a schedule is computed without tensors, and after the drop.
        name: for messages.
    """

    __slots__ = ("_version", "name", "nbytes", "tensor")

    def __init__(self, nbytes: int, tensor: Tensor | None = None, name: str = "") -> None:
        self.nbytes, self.tensor, self.name = nbytes, tensor, name
        self._version: int | None = None

    @classmethod
    def adopted(cls, nbytes: int, tensor: Tensor | None, name: str) -> Buffer:
        """Made by the computation, which should not write to it any more."""
        buffer = cls(nbytes, tensor, name)
        buffer._version = None if tensor is None else tensor._version
        return buffer

    @property
    def changed(self) -> bool:
        """Whether what was adopted has been written to in place, as autograd counts it."""
        return (
            self._version is not None
            and self.tensor is not None
            and self.tensor._version != self._version
        )


class Host:
    """One allocation of host memory.

    Attributes:
        nbytes: its size.
        tensor: uint8 (nbytes,), pinned on CUDA; None where there are no values.
    """

    __slots__ = ("__weakref__", "nbytes", "tensor")

    def __init__(self, nbytes: int, tensor: Tensor | None = None) -> None:
        self.nbytes, self.tensor = nbytes, tensor


class Backend(Protocol):
    """A device, real or virtual. Calls queue work and return at once."""

    def host(self, nbytes: int) -> Host:
        """Allocate host memory, once and for long."""
        ...

    def takes(self, tensor: Tensor) -> bool:
        """Whether the tensor lies on this device."""
        ...

    def adopt(self, nbytes: int, tensor: Tensor | None = None, name: str = "") -> Buffer:
        """Hold memory that the computation made: the whole storage of ``tensor``."""
        ...

    def allocate(self, nbytes: int, name: str = "") -> Buffer:
        """Device memory for the computation's stream; may have been used by what is queued there.

        Others touch it behind an event recorded on that stream after this call.
        """
        ...

    def drop(self, buffer: Buffer) -> None:
        """Let go of it: what the computation is given to do from now on may get this memory."""
        ...

    def copy_out(self, buffer: Buffer, host: Host, offset: int) -> None:
        """Queue a copy to ``host[offset:]`` on the stream OUT."""
        ...

    def copy_in(self, host: Host, offset: int, buffer: Buffer) -> None:
        """Queue a copy of ``host[offset:]`` to ``buffer`` on the stream BACK."""
        ...

    def filled(self, host: Host, offset: int, nbytes: int) -> None:
        """Say that the host itself wrote there, before anything that is queued from now on."""
        ...

    def use(self, buffer: Buffer) -> None:
        """Say that the computation reads the buffer from now on, until it is dropped."""
        ...

    def record(self, stream: int) -> Event:
        """An event behind all that was queued on the stream so far."""
        ...

    def wait(self, stream: int, event: Event) -> None:
        """Let what is queued on the stream from now on run behind the event."""
        ...

    def done(self, event: Event) -> bool:
        """Whether the host can tell, without waiting, that the event has passed."""
        ...

    def synchronize(self, event: Event) -> None:
        """Let the host wait for the event."""
        ...

    @property
    def stall_seconds(self) -> float:
        """How long the computation has waited for copies so far."""
        ...


def as_bytes(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor, uint8 (nbytes,)."""
    if tensor.dtype == torch.uint8 and tensor.dim() == 1 and not tensor.storage_offset():
        return tensor
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
        storage, 0, (storage.nbytes(),), (1,)
    )
