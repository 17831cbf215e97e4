"""(d) All methods at equal images and at equal time."""

from __future__ import annotations

from pathlib import Path

from benchmarks.experiments import figures, truncation
from benchmarks.experiments.context import Context

VARIANTS = ("draft-1", "draft-lv", "alignprop", "refl", "drtune", "srpo", "ddpo")


def run(context: Context) -> None:
    for seed in context.seeds:
        for variant in reversed(VARIANTS):
            context.do("runs", context.short(variant, seed))


def plot(context: Context, folder: Path) -> None:
    rows = context.store("runs").rows()
    if all(row["variant"] in truncation.VARIANTS for row in rows):
        return
    plt = figures.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.1), layout="constrained")
    figures.curves(axes[0], rows, VARIANTS, "samples", "heldout")
    figures.curves(axes[1], rows, VARIANTS, "cpu_seconds", "heldout")
    figures.curves(axes[2], rows, VARIANTS, "cpu_seconds", "alignment")
    axes[0].legend(loc="lower right")
    figures.save(figure, folder / "methods.svg")
