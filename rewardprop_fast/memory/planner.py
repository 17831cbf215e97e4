"""From a budget to a plan: the least modelled time whose peak fits, at every point of the step.

One mode is chosen for every unit (or for a few like units together), and how many of the first
steps are run again as a whole. The bytes alive in an interval are a sum over the units, so the
choice is an integer linear program, which HiGHS solves (scipy.optimize.milp); whole steps and the
residency of weights are few, and are gone through one by one.
"""

from __future__ import annotations

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory.planning.limits import Limits, Residency, limits_on
from rewardprop_fast.memory.planning.planned import Planned
from rewardprop_fast.memory.planning.program import MARGIN, Program
from rewardprop_fast.memory.planning.seconds import least_seconds
from rewardprop_fast.memory.planning.variables import Variables
from rewardprop_fast.memory.profile import Profile
from rewardprop_fast.memory.sizes import format_bytes

__all__ = ["BudgetError", "Limits", "Planned", "Planner", "Residency", "limits_on", "make_plan"]

#: How far the chosen extra time may lie above the least there is: the extra is a tenth of a step.
GAP = 0.01


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
        self.gradient_steps, self.prefix = gradient_steps, prefix
        self.limits, self.gap = limits, gap
        self._variables = Variables(profile, gradient_steps, limits)
        self._parts = [
            (whole, residency)
            for residency in limits.residencies
            for whole in _whole_steps(self._variables)
        ]
        self._known: dict[int, Program] = {}

    def plan(self, budget: int | None) -> Planned:
        """The fastest plan within ``budget`` bytes, None for any. Raises BudgetError."""
        best: Planned | None = None
        profile, k = self._variables.profile, self.gradient_steps
        for index, (whole, residency) in enumerate(self._parts):
            least = least_seconds(profile, k, self.prefix, whole, residency, self.limits)
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
        return int(least / (1 - self.limits.slack)) + 2 * MARGIN

    def _every_problem(self) -> list[Program]:
        return [self._problem(index) for index in range(len(self._parts))]

    def _problem(self, index: int) -> Program:
        if index not in self._known:
            self._known[index] = Program(
                self._variables, self.gradient_steps, self.prefix, *self._parts[index], self.gap
            )
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


def _whole_steps(variables: Variables) -> list[int]:
    """How many of the first steps may be run again as a whole."""
    return [0, *(group.stop for group in variables.groups)]
