"""Capture and replay, as far as it is the same on every device.

A step is captured once for each key: shapes, dtypes and strides of its tensors, guidance or none,
the backend asked for. Before each replay the step's tensors are copied into buffers that the graph
reads; where the UNet's weights lie is checked. A chain that begins with other weights, adapters or
settings is captured anew; values may change in place.
"""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewardprop_fast.ops import registry
from rewardprop_fast.rollout.graph.backend import Eager, GraphBackend
from rewardprop_fast.rollout.graph.step import Step
from rewardprop_fast.rollout.graph.unet_state import UNetState

#: Keys that are remembered: a batch to train on, one to evaluate on, and what remains at the end.
_MOST_PROGRAMS = 4

#: How often a trial times each way; the fastest counts.
_TRIES = 2

#: Of a step's time that a replay must save: below, its memory is worth more.
_LEAST_GAIN = 0.02


class Graph(ABC):
    """A captured step."""

    nbytes: int = 0

    @abstractmethod
    def replay(self) -> Tensor:
        """Run it on what the buffers hold; what it gives lasts until the next replay."""

    @abstractmethod
    def rest(self) -> None:
        """The chain is over; nobody reads the buffers or the output any more."""


class Recorder(ABC):
    """What is the device's part in it."""

    #: Whether a step that cannot be captured is called instead, with a warning.
    forgives: bool = True

    @abstractmethod
    def why_not(self, latents: Tensor) -> str | None:
        """None where it can capture on the latents' device, otherwise the reason it cannot."""

    @abstractmethod
    def capture(
        self,
        run: Callable[[], Tensor],
        buffers: Mapping[str, Tensor],
        changing: Sequence[str],
        state: UNetState,
    ) -> Graph:
        """Warm up and record what ``run`` does.

        Args:
            buffers: all that it reads beside the UNet; warm-up may need their values.
            changing: those that are filled before every replay, not once a chain.
            state: the UNet's tensors.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for what is queued."""

    @abstractmethod
    def drop(self) -> None:
        """Give back what all graphs share; there is none any more."""


@dataclass
class Trial:
    """How long a step of one key takes, called and replayed, and how long its capture, in seconds.

    Attributes:
        warm: whether it has been called once, untimed.
    """

    warm: bool = False
    called: list[float] = field(default_factory=list)
    replayed: list[float] = field(default_factory=list)
    captured: float = 0.0

    def is_due(self) -> list[float] | None:
        """Where the next step's time belongs; None where all are there."""
        for times in (self.called, self.replayed):
            if len(times) < _TRIES:
                return times
        return None

    def pays(self, steps: int, captured: bool) -> bool:
        """Whether replays save time in ``steps`` steps, for which it must be captured or is."""
        gain = min(self.called) - min(self.replayed)
        if gain < _LEAST_GAIN * min(self.called):
            return False
        return captured or gain * steps > self.captured


@dataclass(eq=False)
class Program:
    """One key's step: its graph, if there is one, and what is known of it."""

    state: UNetState
    trial: Trial = field(default_factory=Trial)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    graph: Graph | None = None
    refused: bool = False

    def load(self, told: Mapping[str, Tensor]) -> None:
        """Copy tensors to where the graph reads them."""
        for name, tensor in told.items():
            self.buffers[name].copy_(tensor)

    def drop(self) -> None:
        """Without graph and buffers."""
        self.graph, self.buffers = None, {}


class Captured(GraphBackend):
    """Captures and replays steps, where that is possible and where it pays.

    Args:
        recorder: the device.
        trial: time the first steps both ways and keep the faster; False replays from the first.
        clock: in seconds.

    Attributes:
        captures, replays: how many there have been.
        reasons: why steps were called that might have been replayed.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        trial: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.recorder, self.trial, self.clock = recorder, trial, clock
        self.captures = self.replays = 0
        self.reasons: list[str] = []
        self._programs: dict[Hashable, Program] = {}

    def run(
        self,
        step: Step,
        latents: Tensor,
        shared: Mapping[str, Tensor],
        told: Sequence[Mapping[str, Tensor]],
    ) -> Tensor:
        """As `GraphBackend.run`; where a step cannot be captured, as `Eager.run`."""
        if not told:
            return latents
        reason = self.recorder.why_not(latents)
        if reason is None:
            state = UNetState.of(step.unet)
            reason = state.reason
        if reason is not None:
            self._warn(reason)
            return Eager().run(step, latents, shared, told)
        if step.guidance_scale is not None:
            scale = torch.full((), step.guidance_scale, dtype=latents.dtype, device=latents.device)
            shared = {**shared, "guidance": scale}
        program = self._program(step, state, {**shared, **told[0], "latents": latents})
        loaded = False  # whether the buffers hold what the chain has in common
        replayed = False
        for done, own in enumerate(told):
            inputs = {**own, "latents": latents}
            replayed = self._replays(program, len(told) - done)
            if replayed and program.graph is not None and self._has_moved(program, step):
                program.drop()
            if replayed and program.graph is None:
                replayed, loaded = self._capture(program, step, shared, inputs), False
            if not replayed:
                latents = self._called(program, step, {**shared, **inputs})
                continue
            if not loaded:
                program.load(shared)
                loaded = True
            latents = self._replayed(program, inputs)
        if replayed:
            latents = latents.clone()  # the next replay writes over it
        if program.graph is not None:
            program.graph.rest()
        return latents

    def drop(self) -> None:
        """Give back the memory of all graphs. They are captured anew where that pays again."""
        for program in self._programs.values():
            program.drop()
        self.recorder.drop()

    @property
    def held_bytes(self) -> int:
        """Of graphs, as far as the device can say, and of the buffers they read."""
        programs = [program for program in self._programs.values() if program.graph is not None]
        buffers = (tensor for program in programs for tensor in program.buffers.values())
        graphs = (program.graph.nbytes for program in programs if program.graph is not None)
        return sum(graphs) + sum(tensor.untyped_storage().nbytes() for tensor in buffers)

    def describe(self) -> str:
        """One line on what is done, for people."""
        if self.reasons:
            return f"called, because {self.reasons[0]}"
        live = sum(program.graph is not None for program in self._programs.values())
        return f"{live} of {len(self._programs)} steps captured, {self.replays} replays"

    # --- what is done with the next step ---

    def _program(self, step: Step, state: UNetState, told: Mapping[str, Tensor]) -> Program:
        """That of these shapes, without its graph where the UNet is not what it was."""
        key = _key(step, told)
        program = self._programs.pop(key, None)
        if program is None:
            program = Program(state)
        elif not program.state.is_that_of(state):
            program.drop()
            program.state = state
        self._programs[key] = program  # the youngest is the last
        while len(self._programs) > _MOST_PROGRAMS:
            del self._programs[next(iter(self._programs))]
        return program

    def _replays(self, program: Program, steps: int) -> bool:
        """Whether the next of ``steps`` steps is replayed."""
        if program.refused:
            return False
        if not self.trial:
            return True
        trial = program.trial
        due = trial.is_due()
        if not trial.warm or due is trial.called:
            return False
        if due is None and not trial.pays(steps, program.graph is not None):
            program.drop()
            return False
        return True

    def _has_moved(self, program: Program, step: Step) -> bool:
        name = program.state.moved()
        if name is None:
            return False
        self._refuse_move(name)
        program.state = UNetState.of(step.unet)
        return True

    def _refuse_move(self, name: str) -> None:
        """For backends that take a weight that moves within a chain for a mistake."""

    # --- the ways to run it ---

    def _called(self, program: Program, step: Step, told: Mapping[str, Tensor]) -> Tensor:
        trial = program.trial
        if not self.trial or trial.is_due() is not trial.called:
            return step(told)
        if not trial.warm:
            trial.warm = True
            return step(told)
        return self._timed(trial.called, lambda: step(told))

    def _replayed(self, program: Program, told: Mapping[str, Tensor]) -> Tensor:
        def replay() -> Tensor:
            assert program.graph is not None
            program.load(told)
            return program.graph.replay()

        self.replays += 1
        due = program.trial.is_due() if self.trial else None
        return replay() if due is None else self._timed(due, replay)

    def _timed(self, times: list[float], run: Callable[[], Tensor]) -> Tensor:
        self.recorder.synchronize()
        started = self.clock()
        result = run()
        self.recorder.synchronize()
        times.append(self.clock() - started)
        return result

    def _capture(
        self,
        program: Program,
        step: Step,
        shared: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
    ) -> bool:
        """Whether there is a graph now."""
        started = self.clock()
        told = {**shared, **own}
        try:
            program.buffers = buffers = {name: _buffer(tensor) for name, tensor in told.items()}
            program.load(told)
            program.graph = self.recorder.capture(
                lambda: step(buffers), buffers, tuple(own), program.state
            )
            self.recorder.synchronize()
        except Exception as error:
            program.drop()
            if not self.recorder.forgives:
                raise
            program.refused = True
            first = str(error).partition("\n")[0]
            self._warn(f"capturing a step failed with {type(error).__name__}: {first}")
            return False
        program.trial.captured = self.clock() - started
        self.captures += 1
        return True

    def _warn(self, reason: str) -> None:
        """Once for each reason."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            warnings.warn(f"Steps are called, not replayed: {reason}.", stacklevel=4)


def _key(step: Step, told: Mapping[str, Tensor]) -> Hashable:
    kind = told["latents"].device.type
    wish = registry.current()
    return (
        tuple(
            (name, tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
            for name, tensor in sorted(told.items())
        ),
        step.layers is None,
        step.places is None,
        (wish.name, wish.strict, *sorted(wish.by_operator.items())),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
    )


def _buffer(tensor: Tensor) -> Tensor:
    """Memory for such a tensor, laid out as it is; of its own where it repeats some."""
    if 0 in tensor.stride():
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
