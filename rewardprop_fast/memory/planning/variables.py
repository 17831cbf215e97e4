"""The integer program's variables: one for each mode of each unit, or of a few like units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from rewardprop_fast.memory.kinds import TRANSFORMER_BLOCK
from rewardprop_fast.memory.offload import LEAST_BYTES
from rewardprop_fast.memory.planning.limits import Limits
from rewardprop_fast.memory.profile import MODES, Numbers, Profile, Unit

#: The mode of a recomputed unit whose input waits in host memory.
OFFLOADED = "block, input offloaded"

#: Steps that share their choices, at most so many groups of them.
_MOST_GROUPS = 4

#: Choices for like units of one group of steps.
_MOST_PORTIONS = 6


def groups_of(gradient_steps: int) -> list[range]:
    """The K steps in groups with the same choices; the first, which alone begins a chain, apart."""
    rest = gradient_steps - 1
    count = min(rest, _MOST_GROUPS - 1)
    borders = [1 + rest * i // count for i in range(count + 1)] if count else []
    return [range(1), *(range(a, b) for a, b in pairwise(borders))]


class Variables:
    """What may be chosen for the units of K steps, of the decoder and of the reward.

    Attributes:
        groups: of steps.
        of_step: the units of the first step and of those behind it; tail: of decoder and reward.
        numbers: signature -> mode -> numbers.
        choice: (group or -1, unit) -> its variables by mode.
        cost, moved: of each variable, seconds more than keeping takes, and bytes to the host and
            back.
        alternatives: variables of which one is chosen.
        changed: the chain's variables that do not keep.
    """

    def __init__(self, profile: Profile, gradient_steps: int, limits: Limits) -> None:
        self.profile, self.limits = profile, limits
        self.numbers = {
            unit.signature: dict(self._modes(unit.signature, unit)) for unit in profile.units
        }
        self.groups = groups_of(gradient_steps)
        self.of_step: dict[int, list[int]] = {0: [], 1: []}
        self.tail: list[int] = []
        for index, unit in enumerate(profile.units):
            chain = unit.name.startswith("unet.")
            (self.of_step[unit.step] if chain else self.tail).append(index)
        self.choice: dict[tuple[int, int], dict[str, int]] = {}
        self.cost: list[float] = []
        self.moved: list[int] = []
        self.alternatives: list[list[int]] = []
        self.changed: set[int] = set()
        self._make_variables()

    def _make_variables(self) -> None:
        for number, group in enumerate(self.groups):
            self._choices(number, self.of_step[min(group.start, 1)], len(group))
        self._choices(-1, self.tail, 1)

    def _choices(self, group: int, units: Sequence[int], count: int) -> None:
        alike: dict[str, list[int]] = defaultdict(list)
        for index in units:
            alike[self.profile.units[index].signature].append(index)
        for signature, members in alike.items():
            portions = min(len(members), _MOST_PORTIONS)
            for part in np.array_split(np.array(members), portions):
                variables = {}
                for mode, numbers in self.numbers[signature].items():
                    variables[mode] = len(self.cost)
                    if group >= 0 and mode != "keep":
                        self.changed.add(len(self.cost))
                    keep = self.profile.numbers[signature]["keep"]
                    extra = numbers.forward_seconds + numbers.backward_seconds
                    extra -= keep.forward_seconds + keep.backward_seconds
                    self.cost.append(extra * len(part) * count)
                    moved = numbers.inputs * len(part) * count if mode == OFFLOADED else 0
                    self.moved.append(moved)
                self.alternatives.append(list(variables.values()))
                for index in part:
                    self.choice[group, int(index)] = variables

    def _modes(self, signature: str, unit: Unit) -> Iterator[tuple[str, Numbers]]:
        known = self.profile.numbers[signature]
        for mode in MODES[unit.kind]:
            if mode in known:
                yield mode, known[mode]
        block = known.get("block")
        if not self.limits.offload or unit.kind != TRANSFORMER_BLOCK or block is None:
            return
        if block.inputs >= LEAST_BYTES:  # less stays where it is
            # The input is in the skeleton, as the output of the unit before. Away it is missing.
            yield OFFLOADED, replace(block, kept=block.kept - block.inputs)

    @cached_property
    def on_the_way(self) -> int:
        """Most bytes of inputs to or from the host that are on the device while others run.

        Forward, one input may still wait for the end of its copy; backward, the next one is copied
        back when the one before it is needed, and is there until its own unit runs.
        """
        return max(
            (
                self.numbers_of(unit, OFFLOADED).inputs
                for (_, unit), modes in self.choice.items()
                if OFFLOADED in modes
            ),
            default=0,
        )

    def offload(self, chosen: Collection[int]) -> bool:
        """Whether anything of a choice does."""
        return any(self.moved[variable] for variable in chosen)

    def numbers_of(self, unit: int, mode: str) -> Numbers:
        return self.numbers[self.profile.units[unit].signature][mode]
