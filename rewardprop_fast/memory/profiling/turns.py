"""Running a step as often as it takes to know every mode of every unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from rewardprop_fast.memory.profile import MODES, Numbers, Profile, bytes_of, frozen_bytes
from rewardprop_fast.memory.profiling.reading import inputs_of_steps, read_numbers, read_skeleton
from rewardprop_fast.memory.profiling.run import Clock, Networks, Run

#: More runs than this are not made; modes not seen then are not offered.
_MOST_RUNS = 5


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
    found.weights = {name: frozen_bytes(part) for name, part in parts.items()}
    found.resident = bytes_of(resident)
    found.trained = bytes_of([p for p in networks.unet.parameters() if p.requires_grad])
    first = Run(networks, {}, clock)
    first.go(step, shown, 1, resident)
    found.step_input, found.shared_input = inputs_of_steps(first)
    read_skeleton(first, found)
    found.step_output = first.step_output
    read_numbers(first, found.numbers)
    for _ in range(_MOST_RUNS - 1):
        modes = _turns(found)
        if not any(mode != "keep" for mode in modes.values()):
            break
        run = Run(networks, modes, clock)
        run.go(step, max(number for _, number in modes) + 1, 0, resident)
        read_numbers(run, found.numbers)
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
