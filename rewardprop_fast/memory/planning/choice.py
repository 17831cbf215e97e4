"""What a choice for every unit comes to: bytes in every interval, seconds, holders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from rewardprop_fast.memory.planning.rows import Row, Rows
from rewardprop_fast.memory.profile import Interval


class Choice:
    """Of each unit's variables one.

    Args:
        chosen: those variables.
    """

    def __init__(self, rows: Rows, chosen: Collection[int]) -> None:
        self.rows, self.variables, self.chosen = rows, rows.variables, chosen
        self._recomputes = rows.whole > 0 or not self.variables.changed.isdisjoint(chosen)
        self._offloads = self.variables.offload(chosen)

    def total(self, row: Row) -> int:
        """The bytes in an interval."""
        own = sum(nbytes for variable, nbytes in row.terms.items() if variable in self.chosen)
        return self._constant(row) + own

    def peaks(self, rows: Sequence[Row]) -> tuple[int, dict[str, int]]:
        """The most bytes in all, and in each phase."""
        by_phase: dict[str, int] = {}
        for row in rows:
            total = self.total(row)
            by_phase[row.phase] = max(total, by_phase.get(row.phase, 0))
        by_phase.pop("", None)
        return max(by_phase.values()), by_phase

    def holders(self, row: Row) -> dict[str, int]:
        """What units of each kind hold in an interval; "" is all the rest.

        A unit whose input went to the host holds nothing; the input is missing from the rest.
        """
        kinds = {
            variable: self.variables.profile.units[unit].kind
            for (_, unit), modes in self.variables.choice.items()
            for variable in modes.values()
        }
        found = Counter({"": self._constant(row)})
        for variable, nbytes in row.terms.items():
            if variable in self.chosen:
                found[kinds[variable] if nbytes >= 0 else ""] += nbytes
        return dict(found.most_common())

    def timeline(self) -> list[tuple[str, int, float]]:
        """(phase, most bytes, seconds) of every interval of the whole step, in order."""
        return [
            (row.phase, self.total(row), self._seconds(interval, place))
            for interval, place, row in self.rows.in_order()
        ]

    def _constant(self, row: Row) -> int:
        constant = row.constant
        constant -= 0 if self._recomputes else row.again
        constant -= 0 if self._offloads else row.moving
        return constant

    def _seconds(self, interval: Interval, place: int) -> float:
        if interval.unit < 0:
            return interval.seconds
        modes = self.variables.choice[place, interval.unit].items()
        mode = next(mode for mode, variable in modes if variable in self.chosen)
        numbers = self.variables.numbers_of(interval.unit, mode)
        return numbers.backward_seconds if interval.is_backward else numbers.forward_seconds
