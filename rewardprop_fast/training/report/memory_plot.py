"""The bytes alive over a step, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

_GIB = 2**30

#: Phase -> (what it is called, its shade).
_PHASES = {
    "prefix": ("no gradient", "#eceff1"),
    "suffix": ("UNet forward", "#dbe9f6"),
    "decode": ("decode", "#e4f2e1"),
    "reward": ("reward", "#fdf0d5"),
    "decode_backward": ("decoder backward", "#d3ead0"),
    "backward": ("UNet backward", "#c6dbef"),
    "update": ("update", "#e9e3f1"),
}

#: A curve is drawn through so many points at most, the highest of each stretch.
_MOST_POINTS = 600

#: A phase narrower than this share of the width has no room for its name.
_ROOM = 0.045


@dataclass(frozen=True)
class Curve:
    """What is drawn.

    Attributes:
        points: (seconds, bytes, phase), seconds modelled.
        budget: bytes, None for no line.
        title: of the step.
        card: whose seconds they are.
        exact: from a run of the whole step, not composed from its parts.
    """

    points: Sequence[tuple[float, int, str]]
    budget: int | None
    title: str
    card: str
    exact: bool


def draw(curve: Curve, path: Path) -> None:
    """Write the picture; the suffix says in which format."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [point for point in curve.points if point[2] in _PHASES]
    end = points[-1][0]
    for phase, begin, stop in _stretches(points):
        name, shade = _PHASES[phase]
        axes.axvspan(begin * 1e3, stop * 1e3, color=shade, linewidth=0)
        if stop - begin > _ROOM * end:
            wide = stop - begin > 0.13 * end
            axes.text(
                (begin + stop) / 2 * 1e3,
                0.03,
                name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                rotation=0 if wide else 90,
                fontsize=8,
                color="#455a64",
            )
    thin = [(0.0, points[0][1]), *_thinned(points)]
    axes.fill_between(
        [x * 1e3 for x, _ in thin], [y / _GIB for _, y in thin], color="#1565c0", alpha=0.18, lw=0
    )
    axes.plot([x * 1e3 for x, _ in thin], [y / _GIB for _, y in thin], color="#1565c0", lw=1.1)
    at, most = max(thin, key=lambda point: point[1])
    axes.plot([at * 1e3], [most / _GIB], "o", color="#1565c0", ms=4)
    axes.annotate(
        f"{most / _GIB:.2f} GiB",
        (at * 1e3, most / _GIB),
        (6, 4) if at < 0.8 * end else (-6, 4),
        textcoords="offset points",
        ha="left" if at < 0.8 * end else "right",
        fontsize=9,
    )
    top = most
    if curve.budget is not None:
        top = max(top, curve.budget)
        axes.axhline(curve.budget / _GIB, color="#c62828", lw=1, ls="--")
        axes.text(
            0.005,
            curve.budget / _GIB,
            f"budget {curve.budget / _GIB:.2f} GiB",
            transform=axes.get_yaxis_transform(),
            va="bottom",
            fontsize=8,
            color="#c62828",
        )
    axes.set_ylim(0, top / _GIB * 1.12)
    axes.set_xlim(0, end * 1e3)
    axes.set_ylabel("GiB allocated")
    axes.set_xlabel(
        f"ms, modelled for {curve.card}; of the steps without gradient only the last are shown"
    )
    how = "one run on fake tensors" if curve.exact else "composed from the step's parts"
    axes.set_title(f"{curve.title} ({how})", fontsize=9.5, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    # text as text, and the same bytes for the same curve
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rewardprop"}):
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


def _stretches(points: Sequence[tuple[float, int, str]]) -> list[tuple[str, float, float]]:
    """(phase, beginning, end) of each run of one phase, seconds."""
    found, begin = [], 0.0
    for phase, run in groupby(points, key=lambda point: point[2]):
        *_, (stop, _, _) = run
        found.append((phase, begin, stop))
        begin = stop
    return found


def _thinned(points: Sequence[tuple[float, int, str]]) -> list[tuple[float, int]]:
    """Of every short stretch its highest and its lowest point, in order."""
    end = points[-1][0]
    found: list[tuple[float, int]] = []
    for _, run in groupby(points, key=lambda point: int(point[0] / end * _MOST_POINTS / 2)):
        stretch = [(seconds, nbytes) for seconds, nbytes, _ in run]
        ends = {
            stretch.index(max(stretch, key=lambda p: p[1])),
            stretch.index(min(stretch, key=lambda p: p[1])),
        }
        found += [stretch[index] for index in sorted(ends)]
    return found
