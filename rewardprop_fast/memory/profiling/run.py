"""One run of a step under given modes of its units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from rewardprop_fast.memory import policy
from rewardprop_fast.memory.measure import MemoryTracker
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.memory.profile import CHAIN_BEGINS, MODES
from rewardprop_fast.memory.profiling.notes import Call, Mark
from rewardprop_fast.memory.profiling.probes import Probe, StepCounter
from rewardprop_fast.memory.repeating import RepeatingFakeMode
from rewardprop_fast.memory.segments import (
    Segment,
    reward_segments,
    unet_segments,
    vae_segments,
)

#: Seconds of an operation from (operation, arguments, keywords, output).
Clock = Callable[[Any, Any, Any, Any], float]


@dataclass(frozen=True)
class Networks:
    """What a step runs: for `profile`, which must watch its parts.

    Attributes:
        fake: the mode of their tensors.
    """

    unet: nn.Module
    vae: nn.Module
    reward: object
    fake: RepeatingFakeMode


class Run:
    """One run of a step with given modes, and what was noted."""

    def __init__(
        self, networks: Networks, modes: Mapping[tuple[str, int], str], clock: Clock
    ) -> None:
        self.networks, self.modes, self.clock = networks, modes, clock
        self.calls: list[Call] = []
        self.marks: list[Mark] = []
        self.seconds = 0.0
        self.by_phase: dict[str, float] = {}
        self.phase = ""
        self.prefix_calls = self.step_output = 0
        self.steps_inputs: list[dict[StorageWeakRef, int]] = []  # of each UNet call with gradients
        self.gone: set[StorageWeakRef] = set()  # of these, by the chain's backward pass
        self.gradients = 0  # bytes
        self.without_gradient = [p for p in networks.unet.parameters() if p.requires_grad]
        self.tracker = MemoryTracker(watch=self._operation, fake=networks.fake)
        self.applied: policy.AppliedPlan | None = None

    def go(self, step: Any, k: int, prefix: int, resident: list[Tensor]) -> None:
        units = units_of(self.networks)
        probes = [Probe(self, segment, parts) for segment, parts in units]
        counter = StepCounter(self, self.networks.unet)
        self.tracker.count(resident)
        n = self.networks
        applied = self.applied = policy.apply(self._plan(units, k), n.unet, n.vae, n.reward)
        try:
            for probe in (*probes, counter):
                probe.install()
            with self.tracker:
                step(k, prefix, self._watch)
        finally:
            for probe in (*probes, counter):
                probe.uninstall()
            applied.remove()
        self.mark("finish", -1)

    def _plan(self, units: list[tuple[Segment, list[Segment]]], k: int) -> Plan:
        rules: dict[int, dict[str, Policy]] = {index: {} for index in range(k)}
        for segment, parts in units:
            for index in range(k):
                kinds = MODES[segment.kind][self.modes.get((segment.name, index), "keep")]
                for part in (segment, *parts):
                    if part.kind in kinds:
                        rules[index][part.name] = kinds[part.kind]
        steps = tuple(_those_of(rules[index], "unet") for index in range(k))
        return Plan(steps, _those_of(rules[0], "vae"), _those_of(rules[0], "reward"))

    @contextmanager
    def _watch(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        if phase == CHAIN_BEGINS and self.applied is not None:
            self.applied.begin()
        self.mark("phase", -1)
        try:
            yield
        finally:
            self.mark("phase", -1)
            self.phase = before

    def _operation(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        seconds = self.clock(func, args, kwargs, output)
        self.seconds += seconds
        self.by_phase[self.phase] = self.by_phase.get(self.phase, 0.0) + seconds

    def mark(self, kind: str, call: int) -> None:
        tracker = self.tracker
        peak = tracker.lap()
        if "backward" in self.phase:  # there are hundreds of them, and elsewhere none gets one
            there = [p for p in self.without_gradient if p.grad is not None]
            if there:
                self.gradients += sum(p.nbytes for p in there)
                self.without_gradient = [p for p in self.without_gradient if p.grad is None]
        self.marks.append(
            Mark(kind, call, self.phase, peak, tracker.live_bytes, self.seconds, self.gradients)
        )

    def back(self, index: int) -> None:
        """The backward pass of a unit begins."""
        if self.phase == "backward" and not self.gone:
            self.gone = {s for one in self.steps_inputs for s in one if s.expired()}
        call = self.calls[index]
        call.held = tuple(0 if given.expired() else nbytes for given, nbytes in call.given)
        self.mark("back", index)

    @property
    def step(self) -> int:
        """Of the steps with gradients, the one whose UNet call runs or ran last."""
        return max(len(self.steps_inputs) - 1, 0)


def units_of(networks: Networks) -> list[tuple[Segment, list[Segment]]]:
    """The outermost segments below the whole step, each with those inside it."""
    segments = [
        *unet_segments(networks.unet)[1:],
        *vae_segments(networks.vae),
        *reward_segments(networks.reward),
    ]
    units: list[tuple[Segment, list[Segment]]] = []
    for segment in segments:
        if units and segment.name.startswith(units[-1][0].name + "."):
            units[-1][1].append(segment)
        else:
            units.append((segment, []))
    return [unit for unit in units if unit[0].kind in MODES]


def _those_of(rules: Mapping[str, Policy], network: str) -> dict[str, Policy]:
    return {name: rule for name, rule in rules.items() if name.partition(".")[0] == network}
