"""A run's curves, drawn with matplotlib: one PNG for people, and SVG panels for the HTML report."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rewardprop_fast.files import atomic_write
from rewardprop_fast.training.report.metrics import PHASES

Rows = Sequence[Mapping[str, Any]]

_MAX_POINTS = 600  # more are not visible, and would make the SVG heavy

PHASE_COLOURS = {
    "prefix": "#8da2b8",
    "suffix": "#3b6fd4",
    "decode": "#2a9d8f",
    "reward": "#e0912f",
    "decode_backward": "#b48ae0",
    "backward": "#8a5cc7",
    "update": "#c2607e",
}


@dataclass(frozen=True)
class _Ink:
    """Colours of one drawing."""

    text: str = "#4b535d"
    grid: str = "#e3e6ea"
    reward: str = "#2f63d0"
    heldout: str = "#d9822b"
    other: str = "#59636e"


@dataclass(frozen=True)
class Panel:
    """One chart of the report: a title and inline SVG whose colours follow the page's theme."""

    title: str
    svg: str


# In the SVG each colour is first a placeholder that nothing else uses, then a CSS variable.
_CSS_INK = _Ink(
    text="#010203", grid="#010204", reward="#010205", heldout="#010206", other="#010207"
)
_CSS_VARIABLES = {
    _CSS_INK.text: "var(--muted)",
    _CSS_INK.grid: "var(--line)",
    _CSS_INK.reward: "var(--reward)",
    _CSS_INK.heldout: "var(--heldout)",
    _CSS_INK.other: "var(--muted)",
}

_SMALL_PANELS = (
    ("Gradient norm", "grad_norm"),
    ("Diversity within the batch", "diversity"),
    ("Drift from the base model", "drift"),
)


def plot_reward_curves(metrics: Rows, path: str | os.PathLike[str]) -> Path:
    """Draw a run as one PNG: rewards on top, and beneath them what else was measured.

    Args:
        metrics: rows of metrics.jsonl, any number; missing keys and nulls leave gaps.
        path: the file to write, whole or not at all.
    """
    rows = _ordered(metrics)
    measured = [(title, key) for title, key in _SMALL_PANELS if _has(rows, key)]
    phases = _phases(rows)
    ink = _Ink()
    more = bool(measured or phases)
    figure = Figure(figsize=(10, 6.6 if more else 4), dpi=160, layout="constrained")
    if more:
        parts: Any = figure.subfigures(2, 1, height_ratios=(1.55, 1), hspace=0.05)
        _draw_rewards(parts[0], rows, ink)
        _draw_measures(parts[1], rows, measured, phases, ink)
    else:
        _draw_rewards(figure, rows, ink)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(
        buffer, format="png", facecolor="white", bbox_inches="tight", pad_inches=0.25
    )
    path = Path(path)
    atomic_write(path, buffer.getvalue())
    return path


def reward_panel(metrics: Rows, narrow: bool = False) -> Panel | None:
    """The rewards over the steps, for a wide page or for a telephone; None without any reward."""
    rows = _ordered(metrics)
    if not (_has(rows, "reward_mean") or _has(rows, "heldout_mean")):
        return None
    figure = Figure(figsize=(4.2, 3.4) if narrow else (9.4, 3.5), layout="constrained")
    _draw_rewards(figure, rows, _CSS_INK)
    return Panel("Reward over the steps", _svg(figure, "rewards-narrow" if narrow else "rewards"))


def small_panels(metrics: Rows) -> list[Panel]:
    """Gradient norm, diversity, drift and seconds by phase: those that were measured."""
    rows = _ordered(metrics)
    panels = [
        _small_panel(title, key, partial(_draw_single, rows=rows, key=key, ink=_CSS_INK))
        for title, key in _SMALL_PANELS
        if _has(rows, key)
    ]
    if phases := _phases(rows):
        draw = partial(_draw_phases, rows=rows, phases=phases, ink=_CSS_INK)
        panels.append(_small_panel("Seconds per step, by phase", "phases", draw))
    return panels


def smooth(values: np.ndarray) -> np.ndarray:
    """A moving average over about a twelfth of the run, with straight lines fitted at both ends.

    (N,) finite numbers to (N,). A plain average would flatten the ends, which are what people read.
    """
    half = len(values) // 24
    if half == 0:
        return values
    window = 2 * half + 1
    x = np.arange(window)
    first = np.polyval(np.polyfit(x, values[:window], 1), x[:half])
    last = np.polyval(np.polyfit(x, values[-window:], 1), x[-half:])
    return np.concatenate([first, np.convolve(values, np.ones(window) / window, "valid"), last])


def column(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of ``key`` where it is a finite number."""
    pairs = [
        (row["step"], row[key])
        for row in rows
        if isinstance(row.get(key), (int, float)) and np.isfinite(row[key])
    ]
    return np.array([p[0] for p in pairs], dtype=float), np.array(
        [p[1] for p in pairs], dtype=float
    )


def _draw_rewards(figure: Any, rows: Rows, ink: _Ink) -> None:
    """Both rewards on one axis, or each on its own where their scales would flatten one of them."""
    lines = [
        (label, key, colour)
        for label, key, colour in (
            ("reward", "reward_mean", ink.reward),
            ("held-out reward", "heldout_mean", ink.heldout),
        )
        if _has(rows, key)
    ]
    groups = [lines] if not _scales_differ(rows, lines) else [[line] for line in lines]
    axes = list(np.atleast_1d(figure.subplots(len(groups), 1, sharex=True)))
    for axis, group in zip(axes, groups, strict=True):
        _style(axis, ink)
        for label, key, colour in group:
            _line(axis, rows, key, colour, label)
        if group:
            axis.legend(
                loc="lower left",
                bbox_to_anchor=(-0.01, 1.0),
                ncols=2,
                frameon=False,
                fontsize=10,
                labelcolor="linecolor",
                handlelength=1.1,
                borderaxespad=0.2,
            )
    axes[-1].set_xlabel("step", color=ink.text, fontsize=9)


def _draw_measures(
    figure: Any,
    rows: Rows,
    measured: Sequence[tuple[str, str]],
    phases: Sequence[str],
    ink: _Ink,
) -> None:
    """A row of small charts: one per measure, and the phases stacked, with their legend beneath."""
    count = len(measured) + bool(phases)
    axes = list(np.atleast_1d(figure.subplots(1, count)))
    for axis, (title, key) in zip(axes, measured, strict=False):
        _draw_single(axis, rows, key, ink)
        axis.set_title(title, fontsize=9, color=ink.text, loc="left")
    if phases:
        _draw_phases(axes[-1], rows, phases, ink)
        axes[-1].set_title("Seconds per step", fontsize=9, color=ink.text, loc="left")
        axes[-1].legend(
            fontsize=6.5,
            frameon=False,
            labelcolor=ink.text,
            ncols=3,
            loc="upper left",
            bbox_to_anchor=(-0.04, -0.1),
            handlelength=0.9,
            columnspacing=1.0,
        )


def _scales_differ(rows: Rows, lines: Sequence[tuple[str, str, str]]) -> bool:
    values = [column(rows, key)[1] for _, key, _ in lines]
    if len(values) < 2 or min(len(v) for v in values) < 2:
        return False
    together = float(np.ptp(np.concatenate(values)))
    return together > 0 and min(float(np.ptp(v)) for v in values) < 0.12 * together


def _draw_single(axis: Axes, rows: Rows, key: str, ink: _Ink) -> None:
    _style(axis, ink)
    _line(axis, rows, key, ink.other, None)
    if key in (
        "diversity",
        "drift",
    ):  # distances: only against zero does their height mean anything
        axis.set_ylim(bottom=0)


def _draw_phases(axis: Axes, rows: Rows, phases: Sequence[str], ink: _Ink) -> None:
    _style(axis, ink)
    steps = np.array([row["step"] for row in rows], dtype=float)
    seconds = [[row.get(f"seconds_{phase}") or 0.0 for row in rows] for phase in phases]
    stacked = [smooth(np.array(values, dtype=float)) for values in seconds]
    if len(steps) == 1:
        steps = steps + np.array([-0.4, 0.4])
        stacked = [np.repeat(values, 2) for values in stacked]
    keep = _thinned(len(steps))
    axis.stackplot(
        steps[keep],
        *[values[keep] for values in stacked],
        colors=[PHASE_COLOURS[phase] for phase in phases],
        labels=phases,
        linewidth=0,
    )
    axis.set_ylim(bottom=0)
    axis.margins(x=0)


def _line(axis: Axes, rows: Rows, key: str, colour: str, label: str | None) -> None:
    """The measured values thin, their moving average strong; a few points get dots."""
    steps, values = column(rows, key)
    keep = _thinned(len(steps))
    steps_shown, averaged = steps[keep], smooth(values)[keep]
    if len(steps) >= 24:
        axis.plot(steps_shown, values[keep], color=colour, linewidth=0.8, alpha=0.28)
    if len(steps) == 1:
        axis.set_xlim(steps[0] - 1, steps[0] + 1)
    marker = "o" if len(steps) < 24 else None
    axis.plot(
        steps_shown, averaged, color=colour, linewidth=2, marker=marker, markersize=3.5, label=label
    )


def _style(axis: Axes, ink: _Ink) -> None:
    axis.set_facecolor("none")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(ink.grid)
    axis.grid(axis="y", color=ink.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=ink.text, labelsize=8.5, length=0, pad=5)
    axis.margins(x=0.015)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _small_panel(title: str, name: str, draw: Callable[[Axes], None]) -> Panel:
    figure = Figure(figsize=(4.2, 2.3), layout="constrained")
    draw(figure.subplots())
    return Panel(title, _svg(figure, name))


def _svg(figure: Figure, name: str) -> str:
    """Inline SVG: text in the page's font, colours of its theme, ids that cannot collide."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"rewardprop-{name}"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1
    )
    # Ids such as "figure_1" repeat from chart to chart; nothing refers to those in <g>.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'id="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    for placeholder, variable in _CSS_VARIABLES.items():
        text = text.replace(placeholder, variable)
    # The figure's own white background goes; the page's shows through.
    return re.sub(r'<path d="[^"]*" style="fill: #ffffff"/>', "", text, count=1)


def _ordered(metrics: Rows) -> list[Mapping[str, Any]]:
    return sorted(metrics, key=lambda row: row["step"])


def _has(rows: Rows, key: str) -> bool:
    return len(column(rows, key)[0]) > 0


def _phases(rows: Rows) -> list[str]:
    return [phase for phase in PHASES if _has(rows, f"seconds_{phase}")]


def _thinned(count: int) -> np.ndarray:
    if count <= _MAX_POINTS:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, _MAX_POINTS).round().astype(int))
