"""(f) Too far on purpose: what warns before the pictures break?

Broken is when half of the images that could be told by their prompts no longer can. Each signal is
one that a run could watch; it fires at the first evaluation where it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.experiments import figures, long_runs
from benchmarks.experiments.context import Context

#: Whose runs are drawn; the signals are looked for in all long runs.
VARIANT = "draft-1"
ROWS = 4  # images in a column of the strip

Numbers = Sequence[Mapping[str, float]]
#: By name: does it fire, given the evaluations until now, from the base model on?
SIGNALS: dict[str, Callable[[Numbers], bool]] = {
    "held-out reward 0.25 below its best": lambda past: (
        past[-1]["heldout"] < max(row["heldout"] for row in past) - 0.25
    ),
    "held-out reward 0.5 below the reward": lambda past: (
        past[-1]["reward"] - past[-1]["heldout"] > 0.5
    ),
    "alignment below 90 % of the base model's": lambda past: (
        past[-1]["alignment"] < 0.9 * past[0]["alignment"]
    ),
    "diversity below 90 % of the base model's": lambda past: (
        past[-1]["diversity"] < 0.9 * past[0]["diversity"]
    ),
}


def broken(past: Numbers) -> bool:
    return past[-1]["recognised"] <= 0.5 * past[0]["recognised"]


def fires(rows: figures.Rows, signal: Callable[[Numbers], bool]) -> int | None:
    """The update at which a signal first fires in one run; None if it never does."""
    names = ("reward", "heldout", "alignment", "recognised", "diversity")
    past: list[Mapping[str, float]] = []
    for row in rows:
        past.append({name: float(row[name]) for name in names})
        if signal(past):
            return int(row["step"])
    return None


def run(context: Context) -> None:
    for seed in context.seeds:
        long_runs.do(context, VARIANT, seed)


def plot(context: Context, folder: Path) -> None:
    rows = figures.by(context.store(long_runs.TABLE).rows(), "variant").get(VARIANT)
    if not rows:
        return
    plt = figures.pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), layout="constrained")
    panels = (
        (("reward", "-"), ("heldout", "--")),
        (("alignment", "-"), ("recognised", "--")),
        (("diversity", "-"),),
        (("drift", "-"),),
    )
    steps = [fires(group, broken) for group in figures.by(rows, "seed").values()]
    for i, (axis, gauges) in enumerate(zip(axes, panels, strict=True)):
        for j, (gauge, style) in enumerate(gauges):
            label = figures.LABELS[gauge]
            figures.curve(axis, rows, "step", gauge, label, f"C{i + 5 * j}", style=style)
        for step in steps:
            if step is not None:
                axis.axvline(step, color="0.6", linewidth=0.8, linestyle=":")
    axes[0].set_ylabel("log P(style | image)")
    axes[1].set_ylabel("held-out alignment, share recognised")
    for axis in axes[1:]:
        axis.set_ylim(0)
    axes[0].legend(loc="lower right")
    axes[1].legend(loc="lower left")
    figures.save(figure, folder / "overoptimisation.svg")
    images = long_runs.images(context, VARIANT, context.seeds[0])
    if images is not None:
        columns = [one[:ROWS] for one in images.values()]
        long_runs.write_strip(columns, folder / "overoptimisation.jpg")
    else:
        long_runs.missing_strip(folder / "overoptimisation.jpg", "overoptimisation")
