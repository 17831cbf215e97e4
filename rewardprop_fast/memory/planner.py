"""From a budget to a plan: the least modelled time whose peak fits, at every point of the step.

One mode is chosen for every unit (or for a few like units together), and how many of the first
steps are run again as a whole. The bytes alive in an interval are a sum over the units, so the
choice is an integer linear program, which HiGHS solves (scipy.optimize.milp); whole steps and the
residency of weights are few, and are gone through one by one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory.kinds import (
    ATTENTION,
    FEED_FORWARD,
    RESNET,
    STEP,
    TRANSFORMER_BLOCK,
)
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.memory.profile import (
    BEFORE,
    BEHIND,
    MODES,
    TAIL_PHASES,
    Interval,
    Numbers,
    Profile,
    Unit,
)
from rewardprop_fast.memory.sizes import format_bytes

#: The mode of a recomputed unit whose input waits in host memory.
OFFLOADED = "block, input offloaded"

#: Steps that share their choices, at most so many groups of them.
_MOST_GROUPS = 4

#: Choices for like units of one group of steps.
_MOST_PORTIONS = 6

#: Of one integer program; what was found by then is taken.
_SECONDS = 6

#: How far the chosen extra time may lie above the least there is: the extra is a tenth of a step.
GAP = 0.01

#: Bytes that a plan stays below its budget: a solver's feasibility tolerance is none over it.
_MARGIN = 2**10

#: Names of the segments of a kind within a unit.
_PARTS = {FEED_FORWARD: "feed_forward", ATTENTION: "*attention*", RESNET: "resnets.*"}

Residency = Literal["all", "phases"]


@dataclass(frozen=True)
class Limits:
    """What the plan is for.

    Attributes:
        budget: bytes, None for no limit.
        to_host, to_device: bytes per second between the device and host memory.
        offload: whether inputs of recomputed units may go to host memory.
        residencies: which of "all" and "phases" may be taken.
        slack: share of the budget that is left free, for what a sum of parts may be short by.
        apart: whether the device has memory of its own, so that moving to the host could help.
    """

    budget: int | None
    to_host: float = 20e9
    to_device: float = 20e9
    offload: bool = False
    residencies: tuple[Residency, ...] = ("all",)
    slack: float = 0.0
    apart: bool = True


@dataclass(frozen=True)
class Planned:
    """A plan and what is expected of it.

    Attributes:
        seconds: modelled, of the whole step; unlimited_seconds: with everything kept.
        peak: bytes; by_phase: the peak within each phase.
        offloaded: bytes a step that go to host memory.
        modes: (step, kind, mode) -> number of units, for people.
        at_peak: kind of unit -> bytes that units of this kind hold at the peak; "" is all the rest.
        timeline: gives (phase, most bytes, seconds) of every interval in the order they run, of the
            steps without gradients those that the profile has.
    """

    plan: Plan
    seconds: float
    unlimited_seconds: float
    peak: int
    by_phase: dict[str, int]
    offloaded: int
    modes: dict[tuple[str, str, str], int] = field(default_factory=dict)
    at_peak: dict[str, int] = field(default_factory=dict)
    timeline: Callable[[], list[tuple[str, int, float]]] = list


class BudgetError(ConfigError):
    """No plan fits. Attributes: least, the bytes of the smallest that would."""

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


def make_plan(
    profile: Profile, gradient_steps: int, prefix: int, limits: Limits, gap: float = GAP
) -> Planned:
    """The fastest plan within the budget.

    Args:
        profile: of the step; its second step stands for all behind the first.
        gradient_steps: K.
        prefix: UNet calls without gradients, T - K for most methods.
        gap: how far the extra time may lie above the least there is, as a share of it.

    Raises:
        BudgetError: none fits; it says which budget would do and what would lower it.
    """
    return Planner(profile, gradient_steps, prefix, limits, gap).plan(limits.budget)


class Planner:
    """Plans of one step for several budgets: what does not depend on the budget is set up once.

    Args: as `make_plan`; the limits' budget is not looked at.
    """

    def __init__(
        self,
        profile: Profile,
        gradient_steps: int,
        prefix: int,
        limits: Limits,
        gap: float = GAP,
    ) -> None:
        self.gradient_steps, self.limits, self.gap = gradient_steps, limits, gap
        self._parts = [
            (profile, gradient_steps, prefix, whole, residency, limits)
            for residency in limits.residencies
            for whole in _whole_steps(profile, gradient_steps)
        ]
        self._known: dict[int, _Problem] = {}

    def plan(self, budget: int | None) -> Planned:
        """The fastest plan within ``budget`` bytes, None for any. Raises BudgetError."""
        best: Planned | None = None
        for index, (profile, k, prefix, whole, residency, limits) in enumerate(self._parts):
            least = _least_seconds(profile, k, prefix, whole, residency, limits)
            if best is not None and least >= best.seconds:
                continue
            found = self._problem(index).solve(budget, None if best is None else best.seconds)
            if found is not None and (best is None or found.seconds < best.seconds):
                best = found
        if best is not None:
            return best
        assert budget is not None
        least_bytes = self.least()
        raise BudgetError(
            f"No plan fits into {format_bytes(budget)}: the least that works is "
            f"{format_bytes(least_bytes, up=True)}. {_advice(self.limits, self.gradient_steps)}",
            least_bytes,
        )

    def least(self) -> int:
        """The smallest budget for which there is a plan, bytes."""
        least = min(problem.least() for problem in self._every_problem())
        # one margin to keep to, one for the tolerance
        return int(least / (1 - self.limits.slack)) + 2 * _MARGIN

    def _every_problem(self) -> list[_Problem]:
        return [self._problem(index) for index in range(len(self._parts))]

    def _problem(self, index: int) -> _Problem:
        if index not in self._known:
            self._known[index] = _Problem(*self._parts[index], self.gap)
        return self._known[index]


def _advice(limits: Limits, gradient_steps: int) -> str:
    ways = []
    if limits.apart and "phases" not in limits.residencies:
        ways.append("residency by phases")
    if limits.apart and not limits.offload:
        ways.append("offloading")
    if gradient_steps > 1:
        ways.append("a smaller K")
    return f"What would lower it: {', '.join([*ways, 'a smaller image, batch or reward'])}."


def _groups(gradient_steps: int) -> list[range]:
    """The K steps in groups with the same choices; the first, which alone begins a chain, apart."""
    rest = gradient_steps - 1
    count = min(rest, _MOST_GROUPS - 1)
    borders = [1 + rest * i // count for i in range(count + 1)] if count else []
    return [range(1), *(range(a, b) for a, b in pairwise(borders))]


def _whole_steps(profile: Profile, gradient_steps: int) -> list[int]:
    """How many of the first steps may be run again as a whole."""
    groups = _groups(gradient_steps)
    return [0, *(group.stop for group in groups)]


def _base_seconds(profile: Profile, gradient_steps: int, prefix: int) -> float:
    """Of the whole step, everything kept."""
    seconds = profile.seconds
    chain = seconds.get("suffix", 0.0) + seconds.get("backward", 0.0)
    tail = sum(seconds.get(name, 0.0) for name in ("decode", "reward", "decode_backward"))
    chain *= gradient_steps / profile.gradient_steps
    return prefix * profile.prefix_seconds + chain + tail


def _least_seconds(
    profile: Profile,
    gradient_steps: int,
    prefix: int,
    whole: int,
    residency: Residency,
    limits: Limits,
) -> float:
    """No choice with so many whole steps and this residency can be faster."""
    once = profile.seconds["suffix"] / profile.gradient_steps
    seconds = _base_seconds(profile, gradient_steps, prefix) + whole * once
    if residency == "phases":
        seconds += sum(profile.weights.values()) / limits.to_device
    return seconds


@dataclass
class _Row:
    """Bytes in one interval: a constant and what the choices add.

    Attributes:
        again: of the constant, what is there only where something of the chain is recomputed.
    """

    phase: str
    constant: int
    again: int
    terms: Counter[int]  # variable -> bytes


class _Problem:
    """One integer program: for so many whole steps and one residency."""

    def __init__(
        self,
        profile: Profile,
        gradient_steps: int,
        prefix: int,
        whole: int,
        residency: Residency,
        limits: Limits,
        gap: float = GAP,
    ) -> None:
        self.profile, self.k, self.prefix = profile, gradient_steps, prefix
        self.whole, self.residency, self.limits = whole, residency, limits
        self.gap = gap
        self.least_seconds = _least_seconds(
            profile, gradient_steps, prefix, whole, residency, limits
        )
        self.numbers = {
            unit.signature: dict(self._modes(unit.signature, unit)) for unit in profile.units
        }
        self.groups = _groups(gradient_steps)
        self.of_step: dict[int, list[int]] = {0: [], 1: []}
        self.tail: list[int] = []
        for index, unit in enumerate(profile.units):
            chain = unit.name.startswith("unet.")
            (self.of_step[unit.step] if chain else self.tail).append(index)
        #: (group or -1, unit) -> its variables by mode
        self.choice: dict[tuple[int, int], dict[str, int]] = {}
        self.cost: list[float] = []
        self.moved: list[int] = []  # bytes to the host and back
        self.alternatives: list[list[int]] = []
        self.changed: set[int] = set()  # the chain's variables that do not keep
        self._make_variables()
        self.rows = list(self._rows())

    # --- variables ---

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
        if self.limits.offload and unit.kind == TRANSFORMER_BLOCK and "block" in known:
            # The input is in the skeleton, as the output of the unit before. Away it is missing
            # there; beside the unit that runs the next one's is on its way back.
            block = known["block"]
            yield (
                OFFLOADED,
                replace(
                    block,
                    kept=block.kept - block.inputs,
                    forward=block.forward + block.inputs,
                    backward=block.backward + block.inputs,
                ),
            )

    def _numbers(self, unit: int, mode: str) -> Numbers:
        return self.numbers[self.profile.units[unit].signature][mode]

    # --- rows ---

    def _rows(self) -> Iterator[_Row]:
        """One for each different sum; of those that differ in the constant alone, the largest."""
        largest: dict[tuple[str, tuple[tuple[int, int], ...]], _Row] = {}
        for row in self._all_rows():
            key = (row.phase, tuple(sorted(row.terms.items())))
            if key not in largest or largest[key].constant < row.constant:
                largest[key] = row
        yield from largest.values()

    def _all_rows(self) -> Iterator[_Row]:
        for interval in self.profile.intervals:
            if interval.step == BEHIND:
                yield self._row(interval, self._shift(self.k), None, None)
            elif interval.step == BEFORE:
                yield self._row(interval, self._before, None, None)
            else:
                for number, group in enumerate(self.groups):
                    # of a group's steps, most is alive in the last
                    if min(group.start, 1) == min(interval.step, 1):
                        yield from self._rows_of_step(interval, number, group[-1])

    def _rows_of_step(self, interval: Interval, group: int, step: int) -> Iterator[_Row]:
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
    ) -> _Row:
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
                self._add(terms, -1, [u for u in self.tail if u < interval.opened], 1)
        else:
            if not alone:
                self._add_steps(terms, group, (step or 0) - self.groups[group].start)
            own = [u for u in self.of_step[min(step or 0, 1)] if u < interval.opened]
            if not forgets:
                self._add(terms, group, own, 1)
        if interval.unit >= 0:
            place = -1 if group is None else group
            for mode, variable in self.choice[place, interval.unit].items():
                numbers = self._numbers(interval.unit, mode)
                terms[variable] += numbers.backward if interval.is_backward else numbers.forward
        else:
            constant += interval.extra
        behind = interval.phase in (*TAIL_PHASES, "backward")
        again = self.profile.shared_input if behind else 0
        return _Row(interval.phase, constant + again, again, terms)

    def _add_steps(self, terms: Counter[int], groups: int, of_next: int) -> None:
        """All steps of the first ``groups`` groups, and ``of_next`` of the next one."""
        for number, group in enumerate(self.groups[: groups + 1]):
            count = len(group) if number < groups else of_next
            if group.start >= self.whole:
                self._add(terms, number, self.of_step[min(group.start, 1)], count)

    def _add(self, terms: Counter[int], group: int, units: Sequence[int], count: int) -> None:
        if count == 0:
            return
        for unit in units:
            for mode, variable in self.choice[group, unit].items():
                terms[variable] += count * self._numbers(unit, mode).kept

    def _absent(self, phase: str) -> int:
        """Bytes of weights that are not on the device in a phase."""
        if self.residency == "all":
            return 0
        weights = self.profile.weights
        if phase in TAIL_PHASES:
            return weights["unet"]
        return weights["vae"] + weights["reward"]

    # --- what was chosen ---

    def timeline(self, chosen: Collection[int]) -> list[tuple[str, int, float]]:
        """(phase, most bytes, seconds) of every interval of the whole step, in order."""
        return [
            (row.phase, self._total(row, chosen), self._seconds(interval, place, chosen))
            for interval, place, row in self._in_order()
        ]

    def _in_order(self) -> Iterator[tuple[Interval, int, _Row]]:
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

    def _seconds(self, interval: Interval, place: int, chosen: Collection[int]) -> float:
        if interval.unit < 0:
            return interval.seconds
        modes = self.choice[place, interval.unit].items()
        numbers = self._numbers(interval.unit, next(m for m, v in modes if v in chosen))
        return numbers.backward_seconds if interval.is_backward else numbers.forward_seconds

    def _total(self, row: _Row, chosen: Collection[int]) -> int:
        own = sum(nbytes for variable, nbytes in row.terms.items() if variable in chosen)
        return self._constant(row, chosen) + own

    def _constant(self, row: _Row, chosen: Collection[int]) -> int:
        recomputes = self.whole > 0 or not self.changed.isdisjoint(chosen)
        return row.constant if recomputes else row.constant - row.again

    def _holders(self, row: _Row, chosen: Collection[int]) -> dict[str, int]:
        """What units of each kind hold in an interval; "" is all the rest."""
        kinds = {
            variable: self.profile.units[unit].kind
            for (_, unit), modes in self.choice.items()
            for variable in modes.values()
        }
        found = Counter({"": self._constant(row, chosen)})
        for variable, nbytes in row.terms.items():
            if variable in chosen:
                found[kinds[variable]] += nbytes
        return dict(found.most_common())

    # --- solving ---

    def solve(self, budget: int | None, faster_than: float | None = None) -> Planned | None:
        """The fastest choice within the budget, or None where there is none, or none so fast."""
        n = len(self.cost)
        # one more variable: seconds that copies take beyond the arithmetic they hide behind
        cost = np.append(np.array(self.cost), 1.0)
        constraints = [self._one_each(1)]
        if budget is not None:
            constraints.append(self._within(budget))
        if faster_than is not None:
            constraints.append(
                LinearConstraint(cost[None], -np.inf, faster_than - self.least_seconds)
            )
        moved = np.array(self.moved, dtype=float)
        if moved.any():
            hidden = self.profile.seconds["suffix"] * self.k / self.profile.gradient_steps
            slowest = min(self.limits.to_host, self.limits.to_device)
            row = np.append(moved / slowest, -1.0)[None]
            constraints.append(LinearConstraint(row, -np.inf, hidden))
        bounds = Bounds(np.zeros(n + 1), np.append(np.ones(n), np.inf))
        result = milp(
            cost,
            constraints=constraints,
            bounds=bounds,
            integrality=np.append(np.ones(n), 0),
            options={"mip_rel_gap": self.gap, "time_limit": _SECONDS},
        )
        if result.x is None:
            return None
        chosen = {i for i in range(n) if result.x[i] > 0.5}
        return self._planned(chosen, self.least_seconds + float(result.fun), budget)

    def least(self) -> int:
        """The least peak of any choice, bytes."""
        n = len(self.cost)
        matrix, constants = self._matrix
        matrix = matrix.tolil()
        matrix[:, n] = -1.0
        rows = LinearConstraint(matrix.tocsr(), -np.inf, -constants)
        result = milp(
            np.append(np.zeros(n), 1.0),
            constraints=[self._one_each(1), rows],
            bounds=Bounds(np.zeros(n + 1), np.append(np.ones(n), np.inf)),
            integrality=np.append(np.ones(n), 0),
            options={"mip_rel_gap": 1e-3, "time_limit": _SECONDS},
        )
        chosen = {i for i in range(n) if result.x[i] > 0.5}
        return self._peaks(chosen)[0]

    @cached_property
    def _matrix(self) -> tuple[csr_array, np.ndarray]:
        """MiB, so that the solver's tolerances are small ones; the last column is not used."""
        rows, columns, values = [], [], []
        for number, row in enumerate(self.rows):
            for variable, nbytes in row.terms.items():
                rows.append(number)
                columns.append(variable)
                values.append(nbytes / 2**20)
        shape = (len(self.rows), len(self.cost) + 1)
        constants = np.array([row.constant / 2**20 for row in self.rows])
        return csr_array((values, (rows, columns)), shape=shape), constants

    def _within(self, budget: int) -> LinearConstraint:
        matrix, constants = self._matrix
        allowed = (budget * (1 - self.limits.slack) - _MARGIN) / 2**20
        return LinearConstraint(matrix, -np.inf, allowed - constants)

    def _one_each(self, more: int) -> LinearConstraint:
        rows = [n for n, variables in enumerate(self.alternatives) for _ in variables]
        columns = [v for variables in self.alternatives for v in variables]
        shape = (len(self.alternatives), len(self.cost) + more)
        return LinearConstraint(csr_array((np.ones(len(rows)), (rows, columns)), shape=shape), 1, 1)

    def _peaks(self, chosen: set[int]) -> tuple[int, dict[str, int]]:
        by_phase: dict[str, int] = {}
        for row in self.rows:
            total = self._total(row, chosen)
            by_phase[row.phase] = max(total, by_phase.get(row.phase, 0))
        by_phase.pop("", None)
        return max(by_phase.values()), by_phase

    def _planned(self, chosen: set[int], seconds: float, budget: int | None) -> Planned:
        peak, by_phase = self._peaks(chosen)
        modes: Counter[tuple[str, str, str]] = Counter()
        steps, tail = [], self._names(-1, self.tail, chosen)
        for number, group in enumerate(self.groups):
            names = self._names(number, self.of_step[min(group.start, 1)], chosen)
            for unit, mode in names.items():
                modes[_title(group), unit.kind, mode] += 1
            rules = _rules(names)
            if group.start < self.whole:
                rules = {STEP: Policy.RECOMPUTE, **rules}
                modes[_title(group), STEP, "whole"] += 1
            steps += [rules] * len(group)
        for unit, mode in tail.items():
            modes["decode" if unit.name.startswith("vae.") else "reward", unit.kind, mode] += 1
        plan = Plan(
            tuple(steps),
            _rules({u: m for u, m in tail.items() if u.name.startswith("vae.")}),
            _rules({u: m for u, m in tail.items() if u.name.startswith("reward.")}),
            self.residency,
            budget,
        )
        highest = max(self.rows, key=lambda row: self._total(row, chosen))
        return Planned(
            plan,
            seconds,
            _base_seconds(self.profile, self.k, self.prefix),
            peak,
            by_phase,
            sum(self.moved[variable] for variable in chosen),
            dict(modes),
            self._holders(highest, chosen),
            partial(self.timeline, chosen),
        )

    def _names(self, group: int, units: Sequence[int], chosen: set[int]) -> dict[Unit, str]:
        return {
            self.profile.units[unit]: next(
                mode for mode, variable in self.choice[group, unit].items() if variable in chosen
            )
            for unit in units
        }


def _title(group: range) -> str:
    first, last = group[0] + 1, group[-1] + 1
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _rules(modes: Mapping[Unit, str]) -> dict[str, Policy]:
    """The usual mode of each kind by kind, what differs by name."""
    rules: dict[str, Policy] = {}
    by_kind: dict[str, dict[Unit, str]] = defaultdict(dict)
    for unit, mode in modes.items():
        by_kind[unit.kind][unit] = mode
    for kind, units in by_kind.items():
        usual = Counter(units.values()).most_common(1)[0][0]
        parts = frozenset[str]().union(*(unit.parts for unit in units))
        rules |= _policies(kind, parts, usual)
        for unit, mode in units.items():
            if mode != usual:
                policies = _policies(kind, unit.parts, mode)
                others = _policies(kind, unit.parts, usual).keys() - policies.keys()
                for part, policy in {**dict.fromkeys(others, Policy.KEEP), **policies}.items():
                    rules[unit.name if part == kind else f"{unit.name}.{_PARTS[part]}"] = policy
    return rules


def _policies(kind: str, parts: Collection[str], mode: str) -> dict[str, Policy]:
    if mode == OFFLOADED:
        return {kind: Policy.RECOMPUTE_OFFLOAD}
    found = MODES[kind][mode]
    return {part: policy for part, policy in found.items() if part == kind or part in parts}
