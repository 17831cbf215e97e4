"""(d) All methods at equal images and at equal time."""

from __future__ import annotations

from pathlib import Path

from benchmarks.experiments import figures, truncation
from benchmarks.experiments.context import Context
from benchmarks.experiments.time_to_reward import seconds_to

VARIANTS = ("draft-1", "draft-lv", "alignprop", "refl", "drtune", "srpo", "ddpo")


def run(context: Context) -> None:
    for seed in context.seeds:
        for variant in reversed(VARIANTS):
            context.do("runs", context.short(variant, seed))


def factors(rows: figures.Rows, gauge: str, unit: str) -> dict[str, list[float]]:
    """How many times more of a unit DDPO takes than each other method, a number for each pair.

    To the highest level of the gauge that the run of DDPO had at any evaluation, on straight lines
    between evaluations. Pairs whose other run never gets there are left out.
    """
    groups = figures.by([row for row in rows if row["variant"] in VARIANTS], "variant")
    slow = [list(one) for one in figures.by(groups.pop("ddpo", []), "seed").values()]
    fast = {n: [list(one) for one in figures.by(g, "seed").values()] for n, g in groups.items()}
    found: dict[str, list[float]] = {name: [] for name in fast}
    for run_of_ddpo in slow:
        level = max(float(row[gauge]) for row in run_of_ddpo)
        spent = seconds_to(run_of_ddpo, level, unit, gauge)
        for name, runs in fast.items():
            for one in runs:
                other = seconds_to(one, level, unit, gauge)
                if spent and other:
                    found[name].append(spent / other)
    return found


def plot(context: Context, folder: Path) -> None:
    rows = context.store("runs").rows()
    if all(row["variant"] in truncation.VARIANTS for row in rows):
        return
    figures.by_images_and_time(rows, VARIANTS, folder / "methods.svg", logarithmic=True)
