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
    figures.by_images_and_time(rows, VARIANTS, folder / "methods.svg", logarithmic=True)
