"""The figure of `python -m benchmarks.ops`, drawn from its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(source: Path, target: Path) -> None:
    """Bars of how many times faster than eager all calls of a network are, by operator and pass."""
    found = json.loads(source.read_text())
    rows = [row for row in found["totals"] if "eager" in row["speedup"]]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(6.5 * len(dtypes), 0.27 * len(rows) / len(dtypes) + 1.4)
    )
    for axis, dtype in zip([axes] if len(dtypes) == 1 else axes, dtypes, strict=True):
        mine = [row for row in rows if row["dtype"] == dtype][::-1]
        labels = [f"{row['operator']}, {row['network']}, {row['pass']}" for row in mine]
        values = [row["speedup"]["eager"] for row in mine]
        colours = ["#3b6fb6" if value >= 1 else "#c0504d" for value in values]
        bars = axis.barh(labels, values, color=colours)
        axis.bar_label(bars, [f"{value:.2f}x" for value in values], padding=3, fontsize=7)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_xlim(0, max(values) * 1.15)
        axis.set_title(f"times faster than eager PyTorch, {dtype}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"one thread, {found['device']}", fontsize=8, y=0.995)
    figure.tight_layout()
    figure.savefig(target, dpi=90)
    plt.close(figure)
