"""(g) The LoRA's rank, from 1 to 32, at the same learning rate and number of images."""

from __future__ import annotations

from pathlib import Path

from benchmarks.experiments import figures
from benchmarks.experiments.context import Context

#: The ends first, so that an interrupted command has seen them.
RANKS = (1, 32, 4, 16, 2, 8)
VARIANT = "draft-1"


def run(context: Context) -> None:
    for rank in RANKS:
        for seed in context.seeds:
            context.do("brief", context.brief(VARIANT, seed, rank=rank))


def rows_of(context: Context) -> list[dict[str, str]]:
    """The ends of the runs, a row for each rank and seed."""
    rows = figures.by(context.store("brief").rows(), "variant").get(VARIANT, [])
    return [row for row in rows if row["step"] != "0"]


def plot(context: Context, folder: Path) -> None:
    rows = rows_of(context)
    if len({row["rank"] for row in rows}) < 2:
        return
    rows.sort(key=lambda row: int(row["rank"]))
    plt = figures.pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), layout="constrained")
    for i, (axis, gauge) in enumerate(
        zip(axes, ("heldout", "alignment", "drift", "cpu_seconds"), strict=True)
    ):
        figures.curve(axis, rows, "rank", gauge, "", f"C{i}", at="rank")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(RANKS), [str(rank) for rank in sorted(RANKS)])
        axis.minorticks_off()
    axes[3].set_ylim(0)
    figures.save(figure, folder / "ranks.svg")
