"""The integer linear program: the least time, or the least peak, of any choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from rewardprop_fast.memory.kinds import STEP
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.memory.planning.choice import Choice
from rewardprop_fast.memory.planning.limits import Residency
from rewardprop_fast.memory.planning.planned import Planned
from rewardprop_fast.memory.planning.rows import Rows
from rewardprop_fast.memory.planning.rules import rules_of
from rewardprop_fast.memory.planning.seconds import base_seconds, least_seconds
from rewardprop_fast.memory.planning.variables import Variables
from rewardprop_fast.memory.profile import Unit

#: Of the clock, for one integer program; what was found by then is taken. It takes tenths of a
#: second of a processor that it has to itself; a busy machine must not give another plan.
_SECONDS = 60

#: Bytes that a plan stays below its budget: a solver's feasibility tolerance is none over it.
MARGIN = 2**10


class Program:
    """For so many whole steps and one residency."""

    def __init__(
        self,
        variables: Variables,
        gradient_steps: int,
        prefix: int,
        whole: int,
        residency: Residency,
        gap: float,
    ) -> None:
        self.variables, self.choice = variables, variables.choice
        self.profile, self.limits = variables.profile, variables.limits
        self.k, self.prefix = gradient_steps, prefix
        self.whole, self.residency, self.gap = whole, residency, gap
        self.least_seconds = least_seconds(
            self.profile, gradient_steps, prefix, whole, residency, self.limits
        )
        self._intervals = Rows(variables, gradient_steps, prefix, whole, residency)
        self.rows = list(self._intervals.distinct())

    def solve(self, budget: int | None, faster_than: float | None = None) -> Planned | None:
        """The fastest choice within the budget, or None where there is none, or none so fast."""
        n = len(self.variables.cost)
        # one more variable: seconds that copies take beyond the arithmetic they hide behind
        cost = np.append(np.array(self.variables.cost), 1.0)
        constraints = [self._one_each(1)]
        if budget is not None:
            constraints.append(self._within(budget))
        if faster_than is not None:
            constraints.append(
                LinearConstraint(cost[None], -np.inf, faster_than - self.least_seconds)
            )
        moved = np.array(self.variables.moved, dtype=float)
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
        n = len(self.variables.cost)
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
        return Choice(self._intervals, chosen).peaks(self.rows)[0]

    @cached_property
    def _matrix(self) -> tuple[csr_array, np.ndarray]:
        """MiB, so that the solver's tolerances are small ones; the last column is not used."""
        rows, columns, values = [], [], []
        for number, row in enumerate(self.rows):
            for variable, nbytes in row.terms.items():
                rows.append(number)
                columns.append(variable)
                values.append(nbytes / 2**20)
        shape = (len(self.rows), len(self.variables.cost) + 1)
        constants = np.array([row.constant / 2**20 for row in self.rows])
        return csr_array((values, (rows, columns)), shape=shape), constants

    def _within(self, budget: int) -> LinearConstraint:
        matrix, constants = self._matrix
        allowed = (budget * (1 - self.limits.slack) - MARGIN) / 2**20
        return LinearConstraint(matrix, -np.inf, allowed - constants)

    def _one_each(self, more: int) -> LinearConstraint:
        rows = [n for n, variables in enumerate(self.variables.alternatives) for _ in variables]
        columns = [v for variables in self.variables.alternatives for v in variables]
        shape = (len(self.variables.alternatives), len(self.variables.cost) + more)
        return LinearConstraint(csr_array((np.ones(len(rows)), (rows, columns)), shape=shape), 1, 1)

    def _planned(self, chosen: set[int], seconds: float, budget: int | None) -> Planned:
        found = Choice(self._intervals, chosen)
        peak, by_phase = found.peaks(self.rows)
        modes: Counter[tuple[str, str, str]] = Counter()
        steps, tail = [], self._names(-1, self.variables.tail, chosen)
        for number, group in enumerate(self.variables.groups):
            names = self._names(number, self.variables.of_step[min(group.start, 1)], chosen)
            for unit, mode in names.items():
                modes[_title(group), unit.kind, mode] += 1
            rules = rules_of(names)
            if group.start < self.whole:
                rules = {STEP: Policy.RECOMPUTE, **rules}
                modes[_title(group), STEP, "whole"] += 1
            steps += [rules] * len(group)
        for unit, mode in tail.items():
            modes["decode" if unit.name.startswith("vae.") else "reward", unit.kind, mode] += 1
        plan = Plan(
            tuple(steps),
            rules_of({u: m for u, m in tail.items() if u.name.startswith("vae.")}),
            rules_of({u: m for u, m in tail.items() if u.name.startswith("reward.")}),
            self.residency,
            budget,
        )
        highest = max(self.rows, key=found.total)
        return Planned(
            plan,
            seconds,
            base_seconds(self.profile, self.k, self.prefix),
            peak,
            by_phase,
            sum(self.variables.moved[variable] for variable in chosen),
            dict(modes),
            found.holders(highest),
            found.timeline,
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
