"""(d) DDPO over thousands of images, against methods with gradients: how many times more it takes.

DDPO runs at the rate that the search chose for the others, where it keeps the prompt. The others
run again beside it, so that all seconds are of one machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.experiments import figures
from benchmarks.experiments.context import Context
from benchmarks.experiments.time_to_reward import seconds_to
from benchmarks.experiments.training import Run, plan

TABLE = "ddpo"
GRADIENTS = ("draft-1", "drtune", "alignprop")
#: What is waited for, and in which unit.
GAUGES = ("reward", "heldout")
UNITS = ("samples", "cpu_seconds")


def long_run(context: Context, seed: int) -> Run:
    """At DRaFT-1's rate; its highest one costs DDPO the prompt."""
    size = context.size
    return plan("ddpo", context.rate("draft-1"), seed, size, updates=size.ddpo_long)


def run(context: Context) -> None:
    for seed in context.seeds:
        for variant in GRADIENTS:
            context.do(TABLE, context.short(variant, seed))
    for seed in context.seeds:
        context.do(TABLE, long_run(context, seed))


def factors(rows: figures.Rows, gauge: str, unit: str) -> dict[str, list[float | None]]:
    """How many times more of a unit DDPO takes than each other method, one number for each pair.

    To the highest level of the gauge that the run of DDPO ever had at an evaluation, on straight
    lines between evaluations. None where the other method never gets there.
    """
    groups = figures.by(rows, "variant")
    found: dict[str, list[float | None]] = {name: [] for name in GRADIENTS if name in groups}
    for slow in figures.by(groups.get("ddpo", []), "seed").values():
        level = max(float(row[gauge]) for row in slow)
        spent = seconds_to(slow, level, unit, gauge)
        for name, ratios in found.items():
            for one in figures.by(groups[name], "seed").values():
                other = seconds_to(one, level, unit, gauge)
                ratios.append(spent / other if spent and other else None)
    return found


def best(rows: figures.Rows, gauge: str) -> list[Any]:
    """The evaluation of each run of DDPO at which the gauge was highest."""
    runs = figures.by([row for row in rows if row["variant"] == "ddpo"], "seed").values()
    return [max(one, key=lambda row: float(row[gauge])) for one in runs]


def plot(context: Context, folder: Path) -> None:
    figures.by_images_and_time(
        context.store(TABLE).rows(),
        (*GRADIENTS, "ddpo"),
        folder / "policy_gradient.svg",
        logarithmic=True,
    )
