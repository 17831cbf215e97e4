"""From what was noted of a run to the parts of a profile."""

from __future__ import annotations

from collections.abc import Mapping

from rewardprop_fast.memory.profile import (
    AFTER,
    BEFORE,
    BEHIND,
    UPDATE,
    Interval,
    Numbers,
    Profile,
    Unit,
)
from rewardprop_fast.memory.profiling.notes import Mark
from rewardprop_fast.memory.profiling.run import Run


def _kept(run: Run, index: int) -> int:
    """What call ``index`` kept: alive at its exit, beside its output and what was before."""
    enter, exit_ = _find(run, "enter", index), _find(run, "exit", index)
    return exit_.live - enter.live - run.calls[index].output


def inputs_of_steps(run: Run) -> tuple[int, int]:
    """`Profile.step_input` and `Profile.shared_input`."""
    if not run.steps_inputs:
        return 0, 0
    first, *others = run.steps_inputs
    shared = {storage for storage in first if all(storage in one for one in others)}
    own = [sum(n for s, n in one.items() if s not in shared) for one in run.steps_inputs]
    return max(own), sum(first[storage] for storage in shared & run.gone)


def _find(run: Run, kind: str, call: int) -> Mark:
    return next(mark for mark in run.marks if mark.kind == kind and mark.call == call)


def read_numbers(run: Run, numbers: dict[str, dict[str, Numbers]]) -> None:
    places = {(m.kind, m.call): i for i, m in enumerate(run.marks) if m.call >= 0}
    for index, call in enumerate(run.calls):
        if ("back", index) not in places:
            continue
        enter, exit_ = places["enter", index], places["exit", index]
        back = places["back", index]
        marks = run.marks
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


def read_skeleton(run: Run, found: Profile) -> None:
    """Units and intervals; modes are all "keep" here."""
    with_backward = {m.call for m in run.marks if m.kind == "back"}
    position: dict[int, int] = {}
    for index, call in enumerate(run.calls):
        if index in with_backward:
            position[index] = len(found.units)
            segment = call.segment
            found.units.append(
                Unit(segment.name, segment.kind, call.step, call.signature, call.parts)
            )
    kept = {index: _kept(run, index) for index in position}
    held, opened, running, is_backward, step = 0, 0, -1, False, BEFORE
    for before, mark in zip(run.marks, run.marks[1:], strict=False):
        index = position.get(before.call, -1)
        if before.kind == "enter" and index >= 0:
            running, is_backward, step = index, False, _step_of(run, before.call)
        elif before.kind == "exit" and index >= 0:
            running, opened, held = -1, index + 1, held + kept[before.call]
        elif before.kind == "back" and index >= 0:
            running, opened, is_backward = index, index, True
            held -= kept[before.call]
            step = _step_of(run, before.call)
        elif before.kind == "end":
            running = -1
        elif before.kind == "call":
            found.step_starts.append(before.live - held)
        elif before.kind == "step":
            found.step_ends.append(before.live - held)
        if before.phase == UPDATE:
            running, step = -1, AFTER
        own = kept[_call_of(position, running)] if is_backward and running >= 0 else 0
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
    phases = {mark.phase: mark.live for mark in run.marks if mark.kind == "phase"}
    begins = (m.live for m in run.marks if m.kind == "phase" and m.phase == "backward")
    found.images = max(0, next(begins, 0) - phases.get("suffix", 0) + found.shared_input)
    found.seconds = dict(run.by_phase)
    found.prefix_seconds = run.by_phase.get("prefix", 0.0) / max(1, run.prefix_calls)


def _step_of(run: Run, call: int) -> int:
    name = run.calls[call].segment.name
    return run.calls[call].step if name.startswith("unet.") else BEHIND


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
