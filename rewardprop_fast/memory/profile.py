"""What each part of a step costs in bytes and seconds, under each policy it may have.

A step runs a few times on fake tensors under a tracker. At the borders of every unit (a resnet, a
transformer block, a block of the decoder or of the reward) the live bytes are noted, and the most
between two borders. From the first run, in which everything is kept, comes the skeleton: what is
alive at every border beside what the units keep. In the others the units take turns with their
modes, so that each mode of each kind of unit is seen at least once.

The bytes alive at a border are then the skeleton's and, for every unit between its forward and its
backward, what it keeps under its mode: a sum, which the planner can minimise over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from rewardprop_fast.memory import policy
from rewardprop_fast.memory.kinds import (
    ATTENTION,
    DECODER_BLOCK,
    FEED_FORWARD,
    RESNET,
    REWARD_BLOCK,
    TRANSFORMER_BLOCK,
)
from rewardprop_fast.memory.measure import MemoryTracker
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.memory.segments import (
    Segment,
    reward_segments,
    unet_segments,
    vae_segments,
)
from rewardprop_fast.nn.hoisted import Context, Moment

_R = Policy.RECOMPUTE

#: What may be chosen for a unit: kinds of the segments in it, and their policy. Dearer ones last.
MODES: Mapping[str, Mapping[str, Mapping[str, Policy]]] = {
    TRANSFORMER_BLOCK: {
        "keep": {},
        "feed-forward": {FEED_FORWARD: _R},
        "parts": {FEED_FORWARD: _R, ATTENTION: _R},
        "block": {TRANSFORMER_BLOCK: _R},
    },
    RESNET: {"keep": {}, "block": {RESNET: _R}},
    DECODER_BLOCK: {
        "keep": {},
        "parts": {RESNET: _R, ATTENTION: _R},
        "block": {DECODER_BLOCK: _R, RESNET: _R, ATTENTION: _R},
    },
    REWARD_BLOCK: {"keep": {}, "block": {REWARD_BLOCK: _R}},
}

#: Phases that need the UNet's weights, and those that need the decoder's and the reward's.
CHAIN_PHASES = ("prefix", "suffix", "backward")
TAIL_PHASES = ("decode", "reward", "decode_backward")

#: The phase whose beginning is that of a chain of steps with gradients.
CHAIN_BEGINS = "suffix"

#: Steps of intervals outside the chain of the K steps.
BEFORE, BEHIND = -1, -2

#: More runs than this are not made; modes not seen then are not offered.
_MOST_RUNS = 5


@dataclass(frozen=True)
class Numbers:
    """A unit under one mode. Bytes are beside what was alive before it ran.

    Attributes:
        kept: between its forward and its backward.
        forward, backward: most during it, the gradient of its output included.
        forward_seconds, backward_seconds: modelled.
        inputs: bytes of the first tensor it was called on, which a recomputed unit holds.
        held: bytes of each tensor it was called on that was there still when its backward pass
            began, 0 of the others.
    """

    kept: int
    forward: int
    backward: int
    forward_seconds: float
    backward_seconds: float
    inputs: int
    held: tuple[int, ...] = ()


@dataclass(frozen=True)
class Unit:
    """A part of the step for which one mode is chosen.

    Attributes:
        name: its outermost segment's; step: of the K (or 0), in the order they run.
        signature: units with equal ones have equal numbers.
        parts: the kinds of the segments within it.
    """

    name: str
    kind: str
    step: int
    signature: str
    parts: frozenset[str]


@dataclass(frozen=True)
class Interval:
    """A stretch of the step between two borders.

    Attributes:
        phase: "prefix", "suffix", "decode", "reward", "decode_backward" (of the reward and the
            decoder), "backward" (of the chain).
        step: of the K; `BEFORE` the first, or `BEHIND` the last.
        unit: index of the unit that runs, or -1 for what lies between.
        is_backward: whether the unit's backward pass runs.
        opened: units 0..opened-1 have run forward and not yet backward (beside the running one).
        skeleton: bytes alive at its start, without what units keep.
        extra: most bytes beside that, for stretches without a unit.
        seconds: modelled, everything kept.
        gradients: bytes of the skeleton that are gradients of trained parameters.
    """

    phase: str
    step: int
    unit: int
    is_backward: bool
    opened: int
    skeleton: int
    extra: int
    seconds: float = 0.0
    gradients: int = 0


@dataclass
class Profile:
    """A whole step: its intervals in order, and what the units' modes cost.

    Attributes:
        gradient_steps: how many of the K steps it holds: at most two.
        numbers: signature -> mode -> numbers.
        seconds: modelled, of all operations by phase, with everything kept.
        step_starts, step_ends: skeleton before and behind the UNet's call in each step.
        prefix_seconds: of one UNet call without gradients.
        weights: bytes of the frozen weights of "unet", "vae" and "reward".
        trained: bytes of the trained parameters, and so of their gradients.
        step_input: bytes of what the UNet is called on in one step with gradients alone, which
            recomputing the whole step keeps; step_output: of what it returns.
        shared_input: bytes of what it is called on in every step, or in the only one, as far as
            nobody holds it by the chain's backward pass unless something is recomputed.
        images: bytes of what is there when the chain's backward pass begins, and was not when the
            chain had run: images, rewards, their gradients.
        resident: bytes alive all the time, weights included.
        workspace: most bytes that an operation of the library uses for itself, if it was asked.
    """

    gradient_steps: int
    units: list[Unit] = field(default_factory=list)
    intervals: list[Interval] = field(default_factory=list)
    numbers: dict[str, dict[str, Numbers]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    step_starts: list[int] = field(default_factory=list)
    step_ends: list[int] = field(default_factory=list)
    prefix_seconds: float = 0.0
    weights: dict[str, int] = field(default_factory=dict)
    trained: int = 0
    step_input: int = 0
    shared_input: int = 0
    step_output: int = 0
    images: int = 0
    resident: int = 0
    workspace: int = 0


#: Seconds of an operation from (operation, arguments, keywords, output).
Clock = Callable[[Any, Any, Any, Any], float]


@dataclass(frozen=True)
class Networks:
    """What a step runs: for `profile`, which must watch its parts."""

    unet: nn.Module
    vae: nn.Module
    reward: object


def profile(
    networks: Networks,
    step: Callable[[int, int, Callable[[str], Any]], None],
    resident: list[Tensor],
    gradient_steps: int,
    clock: Clock,
) -> Profile:
    """Run a step as often as it takes to know every mode of every unit.

    Args:
        step: ``step(k, prefix, watch)`` runs one with k steps with gradients and ``prefix``
            without, ``watch(phase)`` around its phases.
        resident: what is alive all the time.
        gradient_steps: K; more than two are not run.
        clock: models an operation's seconds.
    """
    shown = min(gradient_steps, 2)
    found = Profile(shown)
    parts = {"unet": networks.unet, "vae": networks.vae, "reward": networks.reward}
    found.weights = {name: _frozen_bytes(part) for name, part in parts.items()}
    found.resident = _bytes_of(resident)
    found.trained = _bytes_of([p for p in networks.unet.parameters() if p.requires_grad])
    first = _Run(networks, {}, clock)
    first.go(step, shown, 1, resident)
    found.step_input, found.shared_input = first.inputs_of_steps()
    first.read_skeleton(found)
    found.step_output = first.step_output
    first.read_numbers(found.numbers)
    for _ in range(_MOST_RUNS - 1):
        modes = _turns(found)
        if not any(mode != "keep" for mode in modes.values()):
            break
        run = _Run(networks, modes, clock)
        run.go(step, max(number for _, number in modes) + 1, 0, resident)
        run.read_numbers(found.numbers)
    for known in found.numbers.values():
        keep = known["keep"]
        for mode, numbers in known.items():
            known[mode] = _with_inputs(numbers, keep)
    return found


def _with_inputs(numbers: Numbers, keep: Numbers) -> Numbers:
    """With the unit's inputs that are alive because of this mode alone.

    They are there before the unit is, so they count to the skeleton, unless nobody keeps them
    there: frozen weights do not need an input without a gradient, and to recompute does.
    """
    pairs = zip(numbers.held, keep.held, strict=True)
    more = sum(max(0, held - otherwise) for held, otherwise in pairs)
    return replace(numbers, kept=numbers.kept + more, backward=numbers.backward + more)


def _turns(found: Profile) -> dict[tuple[str, int], str]:
    """(unit, step) -> mode: of each signature's units, as many as there are modes not seen yet."""
    missing = {
        unit.signature: [m for m in MODES[unit.kind] if m not in found.numbers[unit.signature]]
        for unit in found.units
    }
    turns = {}
    for unit in found.units:  # those of the first step come first: a second one may not be needed
        modes = missing[unit.signature]
        if modes:
            turns[unit.name, unit.step] = modes.pop(0)
    return turns or {("", 0): "keep"}


@dataclass
class _Mark:
    """A border: what begins or ends there, the most bytes since the one before, the bytes now."""

    kind: str  # "enter", "exit", "back", "end"
    call: int
    phase: str
    peak: int
    live: int
    seconds: float
    gradients: int


@dataclass
class _Call:
    """One call of a unit."""

    segment: Segment
    mode: str
    signature: str
    step: int
    parts: frozenset[str]
    output: int = 0  # bytes
    inputs: int = 0
    given: list[tuple[StorageWeakRef, int]] = field(default_factory=list)
    held: tuple[int, ...] = ()


class _Run:
    """One run of a step with given modes, and what was noted."""

    def __init__(
        self, networks: Networks, modes: Mapping[tuple[str, int], str], clock: Clock
    ) -> None:
        self.networks, self.modes, self.clock = networks, modes, clock
        self.calls: list[_Call] = []
        self.marks: list[_Mark] = []
        self.seconds = 0.0
        self.by_phase: dict[str, float] = {}
        self.phase = ""
        self.prefix_calls = self.step_output = 0
        self.steps_inputs: list[dict[StorageWeakRef, int]] = []  # of each UNet call with gradients
        self.gone: set[StorageWeakRef] = set()  # of these, by the chain's backward pass
        self.gradients = 0  # bytes
        self.without_gradient = [p for p in networks.unet.parameters() if p.requires_grad]
        self.tracker = MemoryTracker(watch=self._operation)
        self.applied: policy.AppliedPlan | None = None

    # --- running ---

    def go(self, step: Any, k: int, prefix: int, resident: list[Tensor]) -> None:
        units = _units(self.networks)
        probes = [_Probe(self, segment, parts) for segment, parts in units]
        counter = _StepCounter(self, self.networks.unet)
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
        there = [p for p in self.without_gradient if p.grad is not None]
        if there:
            self.gradients += sum(p.nbytes for p in there)
            self.without_gradient = [p for p in self.without_gradient if p.grad is None]
        self.marks.append(
            _Mark(kind, call, self.phase, peak, tracker.live_bytes, self.seconds, self.gradients)
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

    # --- reading ---

    def kept(self, index: int) -> int:
        """What call ``index`` kept: alive at its exit, beside its output and what was before."""
        enter, exit_ = self._find("enter", index), self._find("exit", index)
        return exit_.live - enter.live - self.calls[index].output

    def inputs_of_steps(self) -> tuple[int, int]:
        """`Profile.step_input` and `Profile.shared_input`."""
        if not self.steps_inputs:
            return 0, 0
        first, *others = self.steps_inputs
        shared = {storage for storage in first if all(storage in one for one in others)}
        own = [sum(n for s, n in one.items() if s not in shared) for one in self.steps_inputs]
        return max(own), sum(first[storage] for storage in shared & self.gone)

    def _find(self, kind: str, call: int) -> _Mark:
        return next(mark for mark in self.marks if mark.kind == kind and mark.call == call)

    def read_numbers(self, numbers: dict[str, dict[str, Numbers]]) -> None:
        places = {(m.kind, m.call): i for i, m in enumerate(self.marks) if m.call >= 0}
        for index, call in enumerate(self.calls):
            if ("back", index) not in places:
                continue
            enter, exit_ = places["enter", index], places["exit", index]
            back = places["back", index]
            marks = self.marks
            kept = marks[exit_].live - marks[enter].live - call.output
            seen = Numbers(
                kept,
                marks[exit_].peak - marks[enter].live,
                marks[back + 1].peak - marks[back].live + kept,
                marks[exit_].seconds - marks[enter].seconds,
                marks[back + 1].seconds - marks[back].seconds,
                call.inputs,
                call.held,
            )
            modes = numbers.setdefault(call.signature, {})
            before = modes.get(call.mode)
            modes[call.mode] = seen if before is None else _worse(seen, before)

    def read_skeleton(self, found: Profile) -> None:
        """Units and intervals; modes are all "keep" here."""
        with_backward = {m.call for m in self.marks if m.kind == "back"}
        position: dict[int, int] = {}
        for index, call in enumerate(self.calls):
            if index in with_backward:
                position[index] = len(found.units)
                segment = call.segment
                found.units.append(
                    Unit(segment.name, segment.kind, call.step, call.signature, call.parts)
                )
        kept = {index: self.kept(index) for index in position}
        held, opened, running, is_backward, step = 0, 0, -1, False, BEFORE
        for before, mark in zip(self.marks, self.marks[1:], strict=False):
            index = position.get(before.call, -1)
            if before.kind == "enter" and index >= 0:
                running, is_backward, step = index, False, self._step_of(before.call)
            elif before.kind == "exit" and index >= 0:
                running, opened, held = -1, index + 1, held + kept[before.call]
            elif before.kind == "back" and index >= 0:
                running, opened, is_backward = index, index, True
                held -= kept[before.call]
                step = self._step_of(before.call)
            elif before.kind == "end":
                running = -1
            elif before.kind == "call":
                found.step_starts.append(before.live - held)
            elif before.kind == "step":
                found.step_ends.append(before.live - held)
            own = kept[self._call_of(position, running)] if is_backward and running >= 0 else 0
            found.intervals.append(
                Interval(
                    before.phase,
                    step,
                    running,
                    is_backward and running >= 0,
                    opened,
                    before.live - held - own,
                    mark.peak - before.live,
                    mark.seconds - before.seconds,
                    before.gradients,
                )
            )
        phases = {mark.phase: mark.live for mark in self.marks if mark.kind == "phase"}
        begins = (m.live for m in self.marks if m.kind == "phase" and m.phase == "backward")
        found.images = max(0, next(begins, 0) - phases.get("suffix", 0) + found.shared_input)
        found.seconds = dict(self.by_phase)
        found.prefix_seconds = self.by_phase.get("prefix", 0.0) / max(1, self.prefix_calls)

    def _step_of(self, call: int) -> int:
        name = self.calls[call].segment.name
        return self.calls[call].step if name.startswith("unet.") else BEHIND

    @staticmethod
    def _call_of(position: Mapping[int, int], unit: int) -> int:
        return next((call for call, index in position.items() if index == unit), -1)


def _worse(one: Numbers, other: Numbers) -> Numbers:
    return Numbers(
        max(one.kept, other.kept),
        max(one.forward, other.forward),
        max(one.backward, other.backward),
        max(one.forward_seconds, other.forward_seconds),
        max(one.backward_seconds, other.backward_seconds),
        max(one.inputs, other.inputs),
        tuple(map(max, one.held, other.held)),
    )


def _units(networks: Networks) -> list[tuple[Segment, list[Segment]]]:
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


class _Shadow:
    """Stands before a module's forward, whatever stands there already."""

    def __init__(self, run: _Run, module: nn.Module) -> None:
        self.run, self.module = run, module
        self.before: Any = None

    def install(self) -> None:
        self.before = vars(self.module).get("forward")
        vars(self.module)["forward"] = self

    def uninstall(self) -> None:
        if self.before is None:
            vars(self.module).pop("forward", None)
        else:
            vars(self.module)["forward"] = self.before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.before(*args, **kwargs)


class _Probe(_Shadow):
    """Notes a unit's borders."""

    def __init__(self, run: _Run, segment: Segment, parts: list[Segment]) -> None:
        super().__init__(run, segment.module)
        self.segment, self.parts = segment, frozenset(part.kind for part in parts)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        # without gradients also within a chain: a base model's call, a step that is passed over
        if run.phase not in ("suffix", "decode", "reward") or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        index, step = len(run.calls), run.step if run.phase == "suffix" else 0
        mode = run.modes.get((self.segment.name, step), "keep")
        call = _Call(self.segment, mode, self._signature(args, kwargs), step, self.parts)
        run.calls.append(call)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        call.inputs = _bytes_of(tensors[:1])
        storages = [tensor.untyped_storage() for tensor in tensors]
        given = [(StorageWeakRef(storage), storage.nbytes()) for storage in storages]
        del storages
        # what the UNet was called on is not of one unit alone: `Profile.shared_input`
        of_all = run.steps_inputs[-1] if run.phase == "suffix" and run.steps_inputs else {}
        call.given = [(storage, nbytes) for storage, nbytes in given if storage not in of_all]
        args, kwargs = self._ended(index, args, kwargs)
        run.mark("enter", index)
        output = self.forward(*args, **kwargs)
        del args, kwargs
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        call.output = _bytes_of(outputs, but=tensors)
        run.mark("exit", index)
        for leaf in outputs[:1]:
            if leaf.requires_grad:
                leaf.register_hook(lambda _: run.back(index))
        return output

    def _ended(self, index: int, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The same arguments; the first tensor says when its gradient is known: the unit's end."""
        done = False

        def mark(leaf: Any) -> Any:
            nonlocal done
            if done or not isinstance(leaf, Tensor) or not leaf.requires_grad:
                return leaf
            done = True
            leaf = leaf.view_as(leaf)
            leaf.register_hook(lambda _: self.run.mark("end", index))
            return leaf

        # Not within what a rollout has made beforehand: of that there are gradients at other times.
        made = (Context, Moment)
        return tree_map(mark, (args, kwargs), is_leaf=lambda node: isinstance(node, made))

    def _signature(self, args: Any, kwargs: Any) -> str:
        module = self.module
        weights = ",".join(str(tuple(p.shape)) for p in module.parameters())
        given = ",".join(
            f"{tuple(leaf.shape)}{leaf.dtype}{leaf.requires_grad}"
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        )
        return f"{self.segment.kind} {type(module).__name__} {hash(weights)} {given}"


class _StepCounter(_Shadow):
    """Counts the UNet's calls with gradients."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        if run.phase != "suffix":
            run.prefix_calls += 1
            return self.forward(*args, **kwargs)
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        run.steps_inputs.append({StorageWeakRef(one): one.nbytes() for one in storages})
        del tensors, storages
        run.mark("call", -1)
        output = self.forward(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        run.step_output = _bytes_of(outputs)
        del outputs
        run.mark("step", -1)
        return output


def _those_of(rules: Mapping[str, Policy], network: str) -> dict[str, Policy]:
    return {name: rule for name, rule in rules.items() if name.partition(".")[0] == network}


def absent(plan: Plan, unet: nn.Module, vae: nn.Module, reward: object) -> dict[str, int]:
    """Phase -> bytes of weights that are not on the device in it, under a plan."""
    if plan.residency == "all":
        return {}
    chain, tail = _frozen_bytes(unet), _frozen_bytes(vae) + _frozen_bytes(reward)
    return {name: chain if name in TAIL_PHASES else tail for name in (*CHAIN_PHASES, *TAIL_PHASES)}


def _frozen_bytes(network: object) -> int:
    if not isinstance(network, nn.Module):
        return 0
    held = [p for p in network.parameters() if not p.requires_grad]
    return _bytes_of([*held, *network.buffers()])


def _bytes_of(tensors: list[Tensor], but: list[Tensor] | None = None) -> int:
    """Of their storages, each once, without those of other tensors."""
    known = {tensor.untyped_storage()._cdata for tensor in but or ()}
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            total += storage.nbytes()
    return total
