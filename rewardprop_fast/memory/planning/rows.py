"""The bytes alive in every interval of a K-step run, as sums over what may be chosen."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rewardprop_fast.memory.planning.limits import Residency
from rewardprop_fast.memory.planning.variables import Variables
from rewardprop_fast.memory.profile import AFTER, BEFORE, BEHIND, TAIL_PHASES, Interval


@dataclass
class Row:
    """Bytes in one interval: a constant and what the choices add.

    Attributes:
        again: of the constant, what is there only where something of the chain is recomputed.
        moving: of the constant, what is there only where inputs are offloaded.
    """

    phase: str
    constant: int
    again: int
    moving: int
    terms: Counter[int]  # variable -> bytes


class Rows:
    """Those of one number of whole steps and one residency.

    Args:
        gradient_steps, prefix: UNet calls with and without gradients.
        whole: how many of the first steps are run again as a whole.
    """

    def __init__(
        self,
        variables: Variables,
        gradient_steps: int,
        prefix: int,
        whole: int,
        residency: Residency,
    ) -> None:
        self.variables, self.profile = variables, variables.profile
        self.groups, self.k, self.prefix = variables.groups, gradient_steps, prefix
        self.whole, self.residency = whole, residency

    def distinct(self) -> Iterator[Row]:
        """One for each different sum; of those that differ in the constant alone, the largest."""
        largest: dict[tuple[str, tuple[tuple[int, int], ...]], Row] = {}
        for row in self._all():
            key = (row.phase, tuple(sorted(row.terms.items())))
            if key not in largest or largest[key].constant < row.constant:
                largest[key] = row
        yield from largest.values()

    def _all(self) -> Iterator[Row]:
        for interval in self.profile.intervals:
            if interval.step == BEHIND:
                yield self._row(interval, self._shift(self.k), None, None)
            elif interval.step == BEFORE:
                yield self._row(interval, self._before, None, None)
            elif interval.step == AFTER:
                yield self._row(interval, 0, None, None)
            else:
                for number, group in enumerate(self.groups):
                    if min(group.start, 1) == min(interval.step, 1):
                        for step in self._fullest(interval, group):
                            yield from self._rows_of_step(interval, number, step)

    def _fullest(self, interval: Interval, group: range) -> range:
        """In which of a group's steps most may be alive.

        In the last, which has most steps in front of it; but the chain's last runs backward while
        there are no gradients of trained parameters yet, as there are in the one before it.
        """
        behind = interval.phase == "backward" or group.start < self.whole
        return group[-2:] if behind and group[-1] == self.k - 1 else group[-1:]

    def _rows_of_step(self, interval: Interval, group: int, step: int) -> Iterator[Row]:
        shift = self._shift(step)
        behind = interval.phase == "backward"
        made = self.profile.trained if step < self.k - 1 else 0  # gradients, by later steps
        if behind and 0 < step < self.k - 1:
            shift += made - interval.gradients
        if step >= self.whole:
            yield self._row(interval, shift, group, step)
        elif behind:
            shift += self.profile.step_input
            yield self._row(interval, shift, group, step, alone=True)
        else:
            # Forward and, in the backward pass, forward again with all that it keeps.
            yield self._row(interval, shift, group, step, alone=True, forgets=True)
            # There are its output's gradient and, in float32, those of the latents on both sides.
            shift += made + self.profile.images + 5 * self.profile.step_output
            row = self._row(interval, shift, group, step, alone=True)
            yield replace(row, phase="backward")

    @property
    def _before(self) -> int:
        """Of steps without gradients the second finds what the first has left: float32 latents."""
        return 2 * self.profile.step_output if self.prefix > 1 else 0

    def _shift(self, step: int) -> int:
        """What the chain's steps before ``step`` leave alive, beside their units' share.

        As a difference to the skeleton, in which the first step is there, and behind the chain all
        that were shown. A whole step leaves what its UNet was called on.
        """
        if step == 0:
            return 0
        profile, shown = self.profile, self.profile.gradient_steps
        ends = profile.step_ends
        other = ends[1] - ends[0] if shown > 1 else 0
        counted = shown if step == self.k else 1
        shift = (step - counted) * other
        for earlier in range(min(step, self.whole)):
            shift += profile.step_input - self._between(min(earlier, shown - 1))
        return shift

    def _between(self, step: int) -> int:
        """What the UNet's call in a step shown keeps beside its units' share."""
        profile = self.profile
        return profile.step_ends[step] - profile.step_starts[step] - profile.step_output

    def _row(
        self,
        interval: Interval,
        shift: int,
        group: int | None,
        step: int | None,
        alone: bool = False,
        forgets: bool = False,
    ) -> Row:
        """The bytes of ``interval`` in the K-step run.

        Args:
            group, step: which group's and step's it is, or None outside the chain.
            alone: nothing of earlier steps is alive: they are whole ones, as this one is.
            forgets: nothing of this step's units is kept either.
        """
        terms: Counter[int] = Counter()
        constant = interval.skeleton + shift - self._absent(interval.phase)
        if group is None:
            if interval.step == BEHIND:
                self._add_steps(terms, len(self.groups), 0)
                self._add(terms, -1, [u for u in self.variables.tail if u < interval.opened], 1)
        else:
            if not alone:
                self._add_steps(terms, group, (step or 0) - self.groups[group].start)
            own = [u for u in self.variables.of_step[min(step or 0, 1)] if u < interval.opened]
            if not forgets:
                self._add(terms, group, own, 1)
        if interval.unit >= 0:
            place = -1 if group is None else group
            for mode, variable in self.variables.choice[place, interval.unit].items():
                numbers = self.variables.numbers_of(interval.unit, mode)
                terms[variable] += numbers.backward if interval.is_backward else numbers.forward
        else:
            constant += interval.extra
        behind = interval.phase in (*TAIL_PHASES, "backward")
        again = self.profile.shared_input if behind else 0
        moving = 0 if group is None else self.variables.on_the_way
        return Row(interval.phase, constant + again + moving, again, moving, terms)

    def _add_steps(self, terms: Counter[int], groups: int, of_next: int) -> None:
        """All steps of the first ``groups`` groups, and ``of_next`` of the next one."""
        for number, group in enumerate(self.groups[: groups + 1]):
            count = len(group) if number < groups else of_next
            if group.start >= self.whole:
                self._add(terms, number, self.variables.of_step[min(group.start, 1)], count)

    def _add(self, terms: Counter[int], group: int, units: Sequence[int], count: int) -> None:
        if count == 0:
            return
        for unit in units:
            for mode, variable in self.variables.choice[group, unit].items():
                terms[variable] += count * self.variables.numbers_of(unit, mode).kept

    def _absent(self, phase: str) -> int:
        """Bytes of weights that are not on the device in a phase."""
        if self.residency == "all":
            return 0
        weights = self.profile.weights
        if phase in TAIL_PHASES:
            return weights["unet"]
        return weights["vae"] + weights["reward"]

    def in_order(self) -> Iterator[tuple[Interval, int, Row]]:
        """Every interval as it runs, where its unit's choice is, and its bytes."""
        forward: dict[int, list[Interval]] = defaultdict(list)
        backward: dict[int, list[Interval]] = defaultdict(list)
        for interval in self.profile.intervals:
            if interval.phase:
                behind = interval.phase == "backward"
                (backward if behind else forward)[interval.step].append(interval)
        group_of = {step: number for number, group in enumerate(self.groups) for step in group}
        for interval in forward[BEFORE] if self.prefix else ():
            yield interval, -1, self._row(interval, self._before, None, None)
        for step, group in group_of.items():
            for interval in forward[min(step, 1)]:
                # what lies between the last step and the decoder's first unit counts to that step
                if interval.phase == "suffix" or step == self.k - 1:
                    yield interval, group, next(self._rows_of_step(interval, group, step))
        for interval in forward[BEHIND] + backward[BEHIND]:
            yield interval, -1, self._row(interval, self._shift(self.k), None, None)
        for step, group in reversed(group_of.items()):
            if step < self.whole:  # forward again
                for interval in (i for i in forward[min(step, 1)] if i.phase == "suffix"):
                    yield interval, group, [*self._rows_of_step(interval, group, step)][-1]
            for interval in backward[min(step, 1)]:
                yield interval, group, next(self._rows_of_step(interval, group, step))
        for interval in forward[AFTER]:
            yield interval, -1, self._row(interval, 0, None, None)
