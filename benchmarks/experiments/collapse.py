"""(c) AlignProp's random K against fixed K over a long run: who collapses, and when."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.experiments import figures, long_runs
from benchmarks.experiments.context import Context

VARIANTS = ("draft-1", "alignprop", "draft-T")


def run(context: Context) -> None:
    for seed in context.seeds:
        for variant in VARIANTS:
            long_runs.do(context, variant, seed)


def plot(context: Context, folder: Path) -> None:
    rows = context.store(long_runs.TABLE).rows()
    if not rows:
        return
    plt = figures.pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained")
    gauges = ("heldout", "alignment", "recognised", "diversity")
    for axis, gauge in zip(axes, gauges, strict=True):
        figures.curves(axis, rows, VARIANTS, "step", gauge)
        if gauge != "heldout":
            axis.set_ylim(0)
    axes[2].legend(loc="lower left")
    figures.save(figure, folder / "collapse.svg")
    strip(context, folder / "collapse.jpg")


def strip(context: Context, path: Path) -> None:
    """Rows of the first seed's images: the base model's, then each variant's at the end."""
    found = [long_runs.images(context, name, context.seeds[0]) for name in VARIANTS]
    if any(one is None for one in found):
        return long_runs.missing_strip(path, "collapse")
    ends = [list(one.values()) for one in found if one is not None]
    rows = torch.stack([ends[0][0], *(one[-1] for one in ends)])
    long_runs.write_strip(list(rows.transpose(0, 1)), path)
