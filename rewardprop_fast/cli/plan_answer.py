"""What `rewardprop plan` answers: the plan file, the curve, and everything as data."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from rewardprop_fast.cli.plan_question import Question
from rewardprop_fast.memory.plan import Plan
from rewardprop_fast.training.dry_run import DryRun, gradient_steps_of
from rewardprop_fast.training.estimate import made_for, prediction
from rewardprop_fast.training.forecast import Forecast
from rewardprop_fast.training.report.memory_plot import Curve

MODELLED = "times are modelled from the card's data; nothing was run on a GPU"

#: Modes of the planner -> what is done to a unit of that kind.
_IN_WORDS = {
    "feed-forward": "feed-forward recomputed",
    "parts": "parts recomputed",
    "block": "recomputed",
    "block, input offloaded": "recomputed, input offloaded",
    "whole": "recomputed as a whole",
}


@dataclass(frozen=True)
class Answer:
    """A question and its forecast."""

    question: Question
    dry: DryRun
    forecast: Forecast

    @property
    def gradient_steps(self) -> int:
        """K, at most."""
        return gradient_steps_of(self.dry.config)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return self.dry.engine.height, self.dry.engine.width

    def asked(self) -> dict[str, Any]:
        """The step, as data."""
        question = self.question
        return {
            "model": question.model,
            **made_for(self.dry),
            "reward": question.reward,
            "card": question.card.name,
            "offload": question.limits.offload,
            "residency": list(question.limits.residencies),
            "budget_bytes": question.limits.budget,
        }

    def prediction(self) -> dict[str, Any]:
        """What is expected of the plan."""
        found, reserved = self.forecast, self.forecast.reserved
        return {
            **prediction(found.planned, found.exact),
            "workspace_bytes": found.workspace,
            "rounded_bytes": None if reserved is None else reserved.peak_allocated,
            "reserved_bytes": None if reserved is None else reserved.peak_reserved,
        }

    def plan(self) -> Plan:
        """With what it was made for, ready to be written."""
        return replace(
            self.forecast.planned.plan, made_for=self.asked(), prediction=self.prediction()
        )

    def policies(self) -> dict[str, str]:
        """Part of the step -> what is done there, in words."""
        found: dict[str, list[str]] = defaultdict(list)
        kept: dict[str, list[str]] = defaultdict(list)
        for (where, kind, mode), count in self.forecast.planned.modes.items():
            if mode == "keep":
                kept[where].append(f"{kind}s" if count > 1 else kind)
                continue
            name = f"{count} {kind}{'s' if count > 1 else ''}"
            found[where].append(_IN_WORDS[mode] if kind == "step" else f"{name} {_IN_WORDS[mode]}")
        return {
            where: ", ".join(found[where])
            + ("; the rest kept" if found[where] and kept[where] else "")
            or "everything kept"
            for where in {w: None for w, _, _ in self.forecast.planned.modes}
        }

    def curve(self) -> Curve:
        """Bytes over the step."""
        question, found = self.question, self.forecast
        height, width = self.size
        return Curve(
            found.timeline,
            question.limits.budget,
            f"{question.model}, {width} x {height}, K = {self.gradient_steps} of "
            f"{question.train.sampling.steps} steps, batch {question.train.batch_size}, "
            f"{question.train.dtype}",
            question.card.title,
            exact=found.exact is not None,
        )

    def facts(self) -> dict[str, Any]:
        """Everything, for programs."""
        found = self.forecast
        return {
            "asked": self.asked(),
            "prediction": self.prediction(),
            "holders_at_peak_bytes": dict(found.holders),
            "policies": self.policies(),
            "other_budgets": [
                {
                    "budget_bytes": each.budget,
                    "fits": each.seconds is not None,
                    "modelled_seconds": each.seconds,
                    "peak_bytes": each.peak,
                    "residency": each.residency or None,
                }
                for each in found.alternatives
            ],
            "plan": _json(self.plan()),
            "note": MODELLED,
        }


def _json(plan: Plan) -> Any:
    import json

    return json.loads(plan.to_json())
