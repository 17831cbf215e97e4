"""What the plots share: colours, mean and spread over seeds, SVG that is the same every time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.variants import TITLES

Rows = Sequence[Mapping[str, str]]
LABELS = {
    "reward": "reward trained on",
    "heldout": "held-out reward",
    "alignment": "held-out alignment",
    "recognised": "share recognised",
    "diversity": "diversity",
    "samples": "images drawn",
    "step": "updates",
    "cpu_seconds": "seconds of one core",
    "grad_norm": "gradient norm",
    "drift": "drift",
    "rank": "rank",
}
COLOURS = {name: f"C{i % 10}" for i, name in enumerate(TITLES)} | {
    "trl-last": "0.5",
    "trl-random": "k",
}


def pyplot() -> Any:
    """matplotlib's, set up for SVG without a window and without a date."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "experiments"
    matplotlib.rcParams.update({"font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7})
    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write a figure as SVG; the same rows give the same bytes.

    The layout's solver goes through its unknowns by their addresses, so that its last digits differ
    from time to time: it is asked once, and its answer rounded.
    """
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axis in figure.axes:
        axis.set_position([round(float(edge), 3) for edge in axis.get_position().bounds])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot().close(figure)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of the sample; 0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def by(rows: Rows, name: str) -> dict[str, list[Mapping[str, str]]]:
    """Rows in groups of one value of a column, in the order they come."""
    groups: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def curve(
    axis: Any,
    rows: Rows,
    x: str,
    y: str,
    label: str,
    colour: str,
    at: str = "step",
    style: str = "-",
) -> None:
    """Mean over the seeds of y against the mean of x at each step, with a band of one deviation."""
    xs, means, lows, highs = [], [], [], []
    for group in by(rows, at).values():
        numbers = [float(row[y]) for row in group if row.get(y)]
        if not numbers:
            continue
        mean, deviation = spread(numbers)
        xs.append(statistics.fmean(float(row[x]) for row in group))
        means.append(mean)
        lows.append(mean - deviation)
        highs.append(mean + deviation)
    axis.plot(xs, means, style, color=colour, label=label, linewidth=1.2)
    axis.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
    axis.set_xlabel(LABELS.get(x, x))
    axis.set_ylabel(LABELS.get(y, y))


def curves(
    axis: Any, rows: Rows, variants: Sequence[str], x: str, y: str,
    title: Callable[[str], str] = lambda name: TITLES.get(name, name),
) -> None:  # fmt: skip
    """One curve for each variant that has rows."""
    groups = by(rows, "variant")
    for i, name in enumerate(name for name in variants if name in groups):
        curve(axis, groups[name], x, y, title(name), COLOURS.get(name, f"C{i}"))


def last(rows: Rows) -> list[Mapping[str, str]]:
    """The last row of each seed, of rows of one variant."""
    return [group[-1] for group in by(rows, "seed").values()]


def by_images_and_time(
    rows: Rows, variants: Sequence[str], path: Path, *, logarithmic: bool
) -> None:
    """Rewards and alignment against the images drawn (above) and the time taken (below).

    Args:
        logarithmic: axes of images and time, for runs of very different lengths; what was before
            the first update is left out then.
    """
    if not any(row["variant"] in variants for row in rows):
        return
    if logarithmic:
        rows = [row for row in rows if row["step"] != "0"]
    plt = pyplot()
    from matplotlib import ticker

    figure, axes = plt.subplots(2, 3, figsize=(9.5, 5.2))
    figure.subplots_adjust(0.07, 0.16, 0.99, 0.98, wspace=0.3, hspace=0.3)
    for line, x in zip(axes, ("samples", "cpu_seconds"), strict=True):
        for axis, y in zip(line, ("reward", "heldout", "alignment"), strict=True):
            curves(axis, rows, variants, x, y)
            if logarithmic:
                axis.set_xscale("log")
                axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0)))
                axis.xaxis.set_major_formatter("{x:g}")
                axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels))
    save(figure, path)
