"""An NVIDIA GPU as a scheduler's backend: two copy streams beside the current one, events, no more.

`torch.Tensor.record_stream` is not used: it would delay the reuse of memory until a point that
nobody can foresee. Instead the computation's stream waits for a copy before the tensor it touches
is dropped; to the caching allocator all of it then belongs to that stream.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import torch
from torch import Tensor

from rewardprop_fast.memory.scheduling.backend import (
    BACK,
    COMPUTE,
    OUT,
    Buffer,
    Event,
    Host,
    as_bytes,
)


class Cuda:
    """A `Backend`. The computation is whatever stream is current when it is called.

    Args:
        device: "cuda", "cuda:1", ...
        measure: time every wait of the computation with a pair of events.
    """

    def __init__(self, device: torch.device | str = "cuda", measure: bool = True) -> None:
        device = torch.device(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.measure = measure
        self._streams = {OUT: torch.cuda.Stream(self.device), BACK: torch.cuda.Stream(self.device)}
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._stalled = 0.0

    def _stream(self, stream: int) -> torch.cuda.Stream:
        return self._streams.get(stream) or torch.cuda.current_stream(self.device)

    def host(self, nbytes: int) -> Host:
        if not nbytes:
            return Host(0, torch.empty(0, dtype=torch.uint8))
        # Registered and not allocated pinned: torch's allocator of pinned memory rounds up to a
        # power of two, and 9 GiB would take 16.
        tensor = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self.device):
            torch.cuda.check_error(runtime.cudaHostRegister(tensor.data_ptr(), nbytes, 0))
        host = Host(nbytes, tensor)
        # nothing may still copy when the pages become ordinary ones
        weakref.finalize(host, _unregister, self.device, tensor).atexit = False
        return host

    def takes(self, tensor: Tensor) -> bool:
        return tensor.device == self.device

    def adopt(self, nbytes: int, tensor: Tensor | None = None, name: str = "") -> Buffer:
        return Buffer.adopted(nbytes, tensor, name)

    def allocate(self, nbytes: int, name: str = "") -> Buffer:
        return Buffer(nbytes, torch.empty(nbytes, dtype=torch.uint8, device=self.device), name)

    def drop(self, buffer: Buffer) -> None:
        buffer.tensor = None

    def copy_out(self, buffer: Buffer, host: Host, offset: int) -> None:
        assert buffer.tensor is not None
        assert host.tensor is not None
        to = host.tensor[offset : offset + buffer.nbytes]
        self._copy(OUT, as_bytes(buffer.tensor), to)

    def copy_in(self, host: Host, offset: int, buffer: Buffer) -> None:
        assert buffer.tensor is not None
        assert host.tensor is not None
        self._copy(BACK, host.tensor[offset : offset + buffer.nbytes], buffer.tensor)

    def _copy(self, stream: int, source: Tensor, to: Tensor) -> None:
        with torch.cuda.stream(self._streams[stream]):
            to.copy_(source, non_blocking=True)

    def filled(self, host: Host, offset: int, nbytes: int) -> None:
        pass

    def use(self, buffer: Buffer) -> None:
        pass  # the stream order says it

    def record(self, stream: int) -> Event:
        event = torch.cuda.Event()
        event.record(self._stream(stream))
        return event

    def wait(self, stream: int, event: Event) -> None:
        queue = self._stream(stream)
        if stream != COMPUTE or not self.measure:
            queue.wait_event(event)
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(queue)
        queue.wait_event(event)
        after.record(queue)
        self._waits.append((before, after))
        self._add_up()

    def done(self, event: Event) -> bool:
        return bool(event.query())

    def synchronize(self, event: Event) -> None:
        event.synchronize()

    def _add_up(self) -> None:
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            self._stalled += before.elapsed_time(after) / 1000

    @property
    def stall_seconds(self) -> float:
        """Of the waits that are over; measured."""
        self._add_up()
        return self._stalled


def _unregister(device: torch.device, tensor: Tensor) -> None:
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
