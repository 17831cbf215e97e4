"""A memory plan: what is kept, recomputed or offloaded in each part of a step. Data, in JSON.

    {
      "format": "rewardprop-plan", "version": 1,
      "budget_bytes": 12884901888,
      "steps": [{"count": 4, "rules": {"transformer block": "recompute"}},
                {"count": 1, "rules": {"feed-forward": "recompute", "unet.mid_block.*": "keep"}}],
      "decode": {"resnet": "recompute"},
      "reward": {},
      "residency": "all"
    }

A rule's key is a kind of segment or a pattern of names (`fnmatch`); of several that fit, the last
in the file counts; without one, "keep". "steps" are the K steps with gradients in the order they
run; where there are more, the last holds for them too. The rest ("for", "prediction") is for
people: what the plan was made for, and what was expected of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, cast

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory.kinds import KINDS

FORMAT, VERSION = "rewardprop-plan", 1

#: Of the schedules that models are trained with; guards against a slip of the finger.
_MOST_STEPS = 1000

Rules = Mapping[str, "Policy"]


class Policy(str, Enum):
    """What happens to the tensors that a segment saves for its backward pass.

    Attributes:
        KEEP: they stay where they are.
        RECOMPUTE: they are let go of, and made again from the segment's inputs.
        OFFLOAD: they wait in host memory.
        RECOMPUTE_OFFLOAD: they are made again, and the inputs wait in host memory.
        QUANTISE: a codec given to `apply` encodes and decodes them; the library has none.
    """

    KEEP = "keep"
    RECOMPUTE = "recompute"
    OFFLOAD = "offload"
    RECOMPUTE_OFFLOAD = "recompute+offload"
    QUANTISE = "quantise"

    def __str__(self) -> str:
        return self.value


RESIDENCIES = ("all", "phases")


@dataclass(frozen=True)
class Plan:
    """Rules for the K gradient steps, the decoding and the reward.

    Attributes:
        steps: rules of each of the K steps, in the order they run.
        decode, reward: rules of the VAE's decoder and of the reward's networks.
        residency: "all" networks on the device, or those of a "phase" alone.
        budget_bytes: what it was made to fit into; None for no limit.
        made_for, prediction: for people.
    """

    steps: tuple[Rules, ...] = ({},)
    decode: Rules = field(default_factory=dict)
    reward: Rules = field(default_factory=dict)
    residency: Literal["all", "phases"] = "all"
    budget_bytes: int | None = None
    made_for: Mapping[str, Any] = field(default_factory=dict)
    prediction: Mapping[str, Any] = field(default_factory=dict)

    def rules_of_step(self, index: int) -> Rules:
        """Of the gradient step ``index``, 0 the first that runs."""
        return self.steps[min(index, len(self.steps) - 1)]

    def __post_init__(self) -> None:
        if not self.steps:
            raise ConfigError("A plan needs the rules of one gradient step at least: steps=({},).")
        steps = tuple(_rules(rules, "The plan, steps") for rules in self.steps)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "decode", _rules(self.decode, "The plan, decode"))
        object.__setattr__(self, "reward", _rules(self.reward, "The plan, reward"))

    @property
    def offloads(self) -> bool:
        """Whether anything of it goes to host memory."""
        everything = [*self.steps, self.decode, self.reward]
        away = (Policy.OFFLOAD, Policy.RECOMPUTE_OFFLOAD)
        return any(policy in away for rules in everything for policy in rules.values())

    def to_json(self) -> str:
        """Readable and editable; `from_json` gives an equal plan."""
        steps = [
            {"count": len(list(same)), "rules": dict(rules)}
            # as lists: of two mappings that differ in order alone, another rule may be the last
            for rules, same in groupby(self.steps, key=lambda rules: list(rules.items()))
        ]
        data = {
            "format": FORMAT,
            "version": VERSION,
            "for": dict(self.made_for),
            "budget_bytes": self.budget_bytes,
            "steps": steps,
            "decode": dict(self.decode),
            "reward": dict(self.reward),
            "residency": self.residency,
            "prediction": dict(self.prediction),
        }
        return json.dumps(data, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, title: str = "The plan") -> Plan:
        """Read what `to_json` wrote, or a person edited.

        Raises:
            ConfigError: with what is wrong and what is allowed.
        """
        try:
            data = json.loads(text, object_pairs_hook=_without_twins)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{title} is no JSON: {error}.") from None
        return _read(data, title)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file. Raises ConfigError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The plan {path} cannot be read: {error}.") from None
        return cls.from_json(text, f"The plan {path}")


def policy_for(rules: Rules, name: str, kind: str) -> Policy:
    """What ``rules`` say of a segment: the last rule that names it or its kind."""
    found = Policy.KEEP
    for key, policy in rules.items():
        if key == kind or fnmatchcase(name, key):
            found = policy
    return found


def check_rules(rules: Rules, names: Sequence[str], kinds: Sequence[str], title: str) -> None:
    """Refuse rules that name nothing there is. Raises ConfigError."""
    for key in rules:
        if key not in kinds and not any(fnmatchcase(name, key) for name in names):
            here = ", ".join(dict.fromkeys(kinds)) or "none"
            raise ConfigError(
                f"{title} has a rule for {key!r}, which names no segment. Allowed are the kinds "
                f"there are here ({here}) and patterns of names, such as {_example(names)!r}."
            )


def _example(names: Sequence[str]) -> str:
    inner = next((name for name in names if "." in name), "unet.mid_block.")
    return f"{inner.rpartition('.')[0]}.*"


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two equal keys JSON would take the second, in the place of the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twin!r} is there twice")
    return found


def _read(data: Any, title: str) -> Plan:
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise ConfigError(
            f'{title} is not a plan: it should hold "format": "{FORMAT}" and "version": {VERSION}. '
            "`rewardprop plan --json` writes one."
        )
    known = {"format", "version", "for", "budget_bytes", "steps", "decode", "reward"}
    known |= {"residency", "prediction"}
    unknown = data.keys() - known
    if unknown:
        raise ConfigError(
            f"{title} has the key {min(unknown)!r}; allowed are {', '.join(sorted(known))}."
        )
    steps = data.get("steps", [{"count": 1, "rules": {}}])
    if not isinstance(steps, list) or not steps:
        raise ConfigError(f'{title}: "steps" must be a list of {{"count": ..., "rules": ...}}.')
    rules: list[Rules] = []
    for entry in steps:
        count = entry.get("count", 1) if isinstance(entry, dict) else None
        if (
            type(count) is not int
            or not 1 <= count <= _MOST_STEPS
            or entry.keys() - {"count", "rules"}
        ):
            raise ConfigError(
                f'{title}: a step is {{"count": 1 to {_MOST_STEPS}, "rules": {{...}}}}, not '
                f"{entry!r}."
            )
        rules += [_rules(entry.get("rules", {}), f"{title}, steps")] * count
    residency = data.get("residency", "all")
    if residency not in RESIDENCIES:
        allowed = ", ".join(RESIDENCIES)
        raise ConfigError(f"{title}: residency is {residency!r}; allowed: {allowed}.")
    budget = data.get("budget_bytes")
    if budget is not None and (type(budget) is not int or budget < 1):
        raise ConfigError(
            f"{title}: budget_bytes is {budget!r}; allowed: a whole number from 1, or null."
        )
    for key in ("for", "prediction"):
        if not isinstance(data.get(key, {}), dict):
            raise ConfigError(f"{title}: {key!r} is {data[key]!r}; allowed: a mapping.")
    return Plan(
        tuple(rules),
        _rules(data.get("decode", {}), f"{title}, decode"),
        _rules(data.get("reward", {}), f"{title}, reward"),
        cast(Literal["all", "phases"], residency),
        budget,
        data.get("for", {}),
        data.get("prediction", {}),
    )


def _rules(given: Any, title: str) -> Rules:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{title}: rules are a mapping of segments to policies, not {given!r}.")
    found: dict[str, Policy] = {}
    for key, value in given.items():
        try:
            found[key] = Policy(value)
        except ValueError:
            allowed = ", ".join(policy.value for policy in Policy)
            raise ConfigError(f"{title}: {key!r} is {value!r}; allowed: {allowed}.") from None
        if " " in key and key not in KINDS:
            raise ConfigError(f"{title}: there is no kind {key!r}; there are {', '.join(KINDS)}.")
    return found
