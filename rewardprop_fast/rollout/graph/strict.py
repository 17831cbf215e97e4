"""The CPU's double of captured graphs, which proves that a step may be captured.

Nothing is faster with it. A step is run once to warm up and once to be written down: every
operation with the addresses, shapes and strides of what it reads, and the numbers it is told. At a
replay it is run again, must be the same in all of that, and may read nothing but its buffers, the
UNet's weights and its own results. What a GPU would not have is NaN: a step's tensors that nobody
copied to its buffers, an output that is read after the next replay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.rollout.graph.backend import CaptureError
from rewardprop_fast.rollout.graph.captured import Captured, Graph, Recorder
from rewardprop_fast.rollout.graph.unet_state import UNetState
from rewardprop_fast.rollout.graph.watching import Watch


class Strict(Captured):
    """Replays every step under scrutiny, on a CPU.

    Args:
        inside: look into the library's operators too: of use under `ops.backend("reference")`.

    What may not be captured is a CaptureError, whose words name the operation and the module.
    """

    def __init__(self, *, inside: bool = False, **settings: Any) -> None:
        super().__init__(_StrictRecorder(inside), **settings)

    def _refuse_move(self, name: str) -> None:
        raise CaptureError(
            f"{name} has been given other memory within a chain; a captured step would go on with "
            "the old. Write to it in place, or between two chains."
        )


class _StrictRecorder(Recorder):
    forgives = False

    def __init__(self, inside: bool) -> None:
        self.inside = inside

    def why_not(self, latents: Tensor) -> str | None:
        kind = latents.device.type
        return None if kind == "cpu" else f"the strict backend is for a CPU, the latents on {kind}"

    def capture(
        self,
        run: Callable[[], Tensor],
        buffers: Mapping[str, Tensor],
        changing: Sequence[str],
        state: UNetState,
    ) -> Graph:
        run()  # what is packed or compiled once is, then
        return _StrictGraph(run, buffers, changing, state, self.inside)

    def synchronize(self) -> None:
        pass

    def drop(self) -> None:
        pass


class _StrictGraph(Graph):
    def __init__(
        self,
        run: Callable[[], Tensor],
        buffers: Mapping[str, Tensor],
        changing: Sequence[str],
        state: UNetState,
        inside: bool,
    ) -> None:
        self.run, self.buffers, self.changing = run, buffers, changing
        self.state, self.inside = state, inside
        self.output: Tensor | None = None
        watch = self._watch(None)
        with watch():
            output = run()
        watch.result(output)
        self.script = watch.operations
        poison(output)

    def replay(self) -> Tensor:
        if self.output is not None:
            poison(self.output)
        watch = self._watch(self.script)
        with watch():
            self.output = self.run()
        for name in self.changing:
            poison(self.buffers[name])
        return self.output

    def rest(self) -> None:
        for tensor in (*self.buffers.values(), self.output):
            if tensor is not None:
                poison(tensor)

    def _watch(self, script: Any) -> Watch:
        return Watch(self.buffers, self.state, script, inside=self.inside)


def poison(tensor: Tensor) -> None:
    """Values that show: NaN, or the largest integer."""
    floating = tensor.is_floating_point() or tensor.is_complex()
    tensor.fill_(float("nan") if floating else torch.iinfo(tensor.dtype).max)
