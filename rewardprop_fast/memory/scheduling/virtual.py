"""A device in virtual time: when each stream is ready, how long the computation waits. No tensors.

Copies take bytes / bandwidth, one after another on each of the two copy streams, which do not slow
each other down (a PCIe link is full duplex). The computation takes the seconds it is said to take.
"""

from __future__ import annotations

from torch import Tensor

from rewardprop_fast.memory.scheduling.backend import (
    BACK,
    COMPUTE,
    OUT,
    STREAMS,
    Buffer,
    Event,
    Host,
)


class VirtualDevice:
    """The times of a `Backend`, whose events are seconds; checks nothing.

    Args:
        to_host, to_device: bandwidths in bytes/s.

    Attributes:
        ready: when each stream has done what it was given, in seconds.
        busy: seconds of work each stream was given.
        stall_seconds: how long the computation waited for copies.
        device_bytes_now, peak_device_bytes: held by the scheduler.
    """

    def __init__(self, to_host: float, to_device: float) -> None:
        if not to_host > 0 or not to_device > 0:
            raise ValueError(f"Bandwidths must be positive bytes/s, not {to_host}, {to_device}.")
        self.ready = [0.0, 0.0, 0.0]
        self.busy = [0.0, 0.0, 0.0]
        self._rates = (0.0, to_host, to_device)
        self.stall_seconds = 0.0
        self.device_bytes_now = self.peak_device_bytes = 0

    def compute(self, seconds: float) -> None:
        """Queue that much computation."""
        self.ready[COMPUTE] += seconds
        self.busy[COMPUTE] += seconds

    def host(self, nbytes: int) -> Host:
        return Host(nbytes)

    def takes(self, tensor: Tensor) -> bool:
        return True

    def adopt(self, nbytes: int, tensor: Tensor | None = None, name: str = "") -> Buffer:
        self._hold(nbytes)
        return Buffer.adopted(nbytes, tensor, name)

    def allocate(self, nbytes: int, name: str = "") -> Buffer:
        self._hold(nbytes)
        return Buffer(nbytes, None, name)

    def _hold(self, nbytes: int) -> None:
        self.device_bytes_now += nbytes
        if self.device_bytes_now > self.peak_device_bytes:
            self.peak_device_bytes = self.device_bytes_now

    def drop(self, buffer: Buffer) -> None:
        self.device_bytes_now -= buffer.nbytes

    def copy_out(self, buffer: Buffer, host: Host, offset: int) -> None:
        self._copy(OUT, buffer.nbytes)

    def copy_in(self, host: Host, offset: int, buffer: Buffer) -> None:
        self._copy(BACK, buffer.nbytes)

    def _copy(self, stream: int, nbytes: int) -> None:
        seconds = nbytes / self._rates[stream]
        self.ready[stream] += seconds
        self.busy[stream] += seconds

    def filled(self, host: Host, offset: int, nbytes: int) -> None:
        pass

    def use(self, buffer: Buffer) -> None:
        pass

    def record(self, stream: int) -> Event:
        return self.ready[stream]

    def wait(self, stream: int, event: Event) -> None:
        late = event - self.ready[stream]
        if late > 0:
            self.ready[stream] = event
            if stream == COMPUTE:
                self.stall_seconds += late

    def done(self, event: Event) -> bool:
        """Never by itself: a host that queues faster than the device works sees nothing finish."""
        return False

    def synchronize(self, event: Event) -> None:
        pass

    def busy_seconds(self) -> dict[str, float]:
        """By stream: "compute", "out", "back"."""
        return dict(zip(STREAMS, self.busy, strict=True))
