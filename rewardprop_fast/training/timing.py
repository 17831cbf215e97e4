"""Seconds per phase of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

#: What surrounds a phase of a step: `with watch("decode"): ...`.
Watch = Callable[[str], AbstractContextManager[None]]


def unwatched(_: str) -> AbstractContextManager[None]:
    """Surrounds nothing with nothing."""
    return nullcontext()


class PhaseTimer:
    """Adds up wall time under names; on a GPU it waits for queued work before it reads a clock.

    Args:
        watch: also surrounds every phase: a memory tracker's, say.
    """

    def __init__(self, device: torch.device, watch: Watch = unwatched) -> None:
        self.device, self.watch = device, watch
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self._now()
        try:
            with self.watch(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
