"""A stand-in for `torch.cuda` on a CPU, where nothing is done before somebody has to wait for it.

A copy that is queued on a side stream poisons its destination, and runs when another stream, or the
host, waits for an event behind it. So the backend's own calls are what makes values right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.queue: list[Callable[[], None]] = []
        self.done = 0

    def run_until(self, position: int) -> None:
        while self.done < position:
            self.queue[self.done]()
            self.done += 1

    def wait_event(self, event: Event) -> None:
        event.pass_by()


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.timed = enable_timing
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream, self.position = stream, len(stream.queue)

    def pass_by(self) -> None:
        assert self.stream is not None
        self.stream.run_until(self.position)

    def query(self) -> bool:
        assert self.stream is not None
        return self.stream.done >= self.position

    synchronize = pass_by

    def elapsed_time(self, other: Event) -> float:
        assert self.timed
        assert other.timed
        return 250.0  # ms


class _Late(TorchDispatchMode):
    """Queues copies on a stream."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        to, source, non_blocking = args
        assert non_blocking
        before = source.clone()

        def copy() -> None:
            assert torch.equal(source, before), "written to while it was copied"
            to.copy_(source)

        to.fill_(0xFF)
        self.stream.queue.append(copy)
        return to


class LateCuda:
    """What of `torch.cuda` a backend uses."""

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        self.current = Stream()
        self.registered: dict[int, int] = {}

    def install(self, monkeypatch: Any) -> None:
        for name in ("Stream", "Event", "current_stream", "stream", "cudart", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "check_error", self._check)

    def current_stream(self, device: Any = None) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        with _Late(stream):
            yield

    def synchronize(self, device: Any = None) -> None:
        pass

    def cudart(self) -> Any:
        return SimpleNamespace(
            cudaHostRegister=self._register,
            cudaHostUnregister=lambda address: self.registered.pop(address) and 0,
        )

    def _register(self, address: int, nbytes: int, flags: int) -> int:
        self.registered[address] = nbytes
        return flags

    @staticmethod
    def _check(code: int) -> None:
        assert code == 0
