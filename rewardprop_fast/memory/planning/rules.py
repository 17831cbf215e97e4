"""From the mode of every unit to the rules of a plan."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

from rewardprop_fast.memory.kinds import ATTENTION, FEED_FORWARD, RESNET
from rewardprop_fast.memory.plan import Policy
from rewardprop_fast.memory.planning.variables import OFFLOADED
from rewardprop_fast.memory.profile import MODES, Unit

#: Names of the segments of a kind within a unit.
_PARTS = {FEED_FORWARD: "feed_forward", ATTENTION: "*attention*", RESNET: "resnets.*"}


def rules_of(modes: Mapping[Unit, str]) -> dict[str, Policy]:
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
