"""Results as JSON rows, a Markdown table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

GIB = 2**30

NAMES = {
    "trl": "TRL 0.23.1",
    "compat": "rewardprop_fast by TRL's interface",
    "loop": "diffusers + peft loop",
    "loop-checkpoint": "loop, checkpointing",
    "loop-compile": "loop, torch.compile",
    "loop-graphs": "loop, torch.compile with CUDA graphs",
    "loop-xformers": "loop, xformers",
    "ours": "rewardprop_fast",
    "ours-lean": "rewardprop_fast, blocks recomputed",
}
OURS = "ours"


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["workload"], row["dtype"], row["competitor"]


def merge(before: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows in the place of older ones of the same race."""
    races = {key(row)[:2] for row in new}
    return [row for row in before if key(row)[:2] not in races] + list(new)


def ratio(row: dict[str, Any], ours: dict[str, Any] | None) -> float | None:
    """How many times faster ours is: the median over the rounds."""
    if ours is None or not row.get("seconds") or not ours.get("seconds"):
        return None
    pairs = zip(row["seconds"], ours["seconds"], strict=False)
    return statistics.median(a / b for a, b in pairs)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; one block for each workload and dtype."""
    lines = [
        "| workload | who | median s | least s | this library faster | of GEMM peak "
        "| resident peak | tracked | gradient error |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (_, dtype), group in groupby(rows, key=lambda row: key(row)[:2]):
        block = list(group)
        ours = next((row for row in block if row["competitor"] == OURS), None)
        title = f"{block[0]['title']}, {dtype}"
        for row in sorted(block, key=lambda row: row.get("median", float("inf"))):
            lines.append(_line(title, row, ratio(row, ours)))
            title = ""
    return "\n".join(lines)


def _line(title: str, row: dict[str, Any], times: float | None) -> str:
    name = NAMES.get(row["competitor"], row["competitor"])
    if row["failed"] and not row.get("seconds"):
        reason = str(row["failed"]).replace("|", "/").replace("\n", " ")[:160]
        return f"| {title} | {name} | did not run: {reason} | | | | | | |"
    error = f"{row['error']:.1e}"
    if not row["counts"]:
        return (
            f"| {title} | {name} | does not count: its gradients disagree | | | | "
            f"{_gib(row['step_peak'])} | {_gib(row['tracked_peak'])} | {error} "
            f"(limit {row['limit']:.1e}) |"
        )
    same = row["competitor"] == OURS or times is None
    cells = [
        title,
        name,
        f"{row['median']:.3g}",
        f"{row['min']:.3g}",
        "" if same else f"{times:.2f}×",
        f"{100 * row['share']:.0f} %" if row.get("share") else "",
        _gib(row["step_peak"]),
        _gib(row["tracked_peak"]),
        error,
    ]
    return "| " + " | ".join(cells) + " |"


def _gib(nbytes: int | None) -> str:
    return "" if not nbytes else f"{nbytes / GIB:.2f} GiB"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds and resident peak of what counts, a row of bars for each race; an SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "peers"
    blocks = [
        (key_, list(group))
        for key_, group in groupby(
            (r for r in rows if r["counts"] and r.get("seconds")), key=lambda r: key(r)[:2]
        )
    ]
    if not blocks:
        return
    figure, axes = pyplot.subplots(
        len(blocks), 2, figsize=(9, 0.6 + 1.35 * len(blocks)), squeeze=False, layout="constrained"
    )
    for (times, peaks), ((_, dtype), block) in zip(axes, blocks, strict=True):
        block.sort(key=lambda row: row["median"])
        names = [NAMES.get(row["competitor"], row["competitor"]) for row in block]
        colours = ["C0" if row["competitor"].startswith("ours") else "0.7" for row in block]
        times.barh(names, [row["median"] for row in block], color=colours)
        peaks.barh(names, [row["step_peak"] / GIB for row in block], color=colours)
        times.set_title(f"{block[0]['title']}, {dtype}: seconds", fontsize=8, loc="left")
        peaks.set_title("peak, GiB", fontsize=8, loc="left")
        peaks.set_yticks([])
        for axis in (times, peaks):
            axis.invert_yaxis()
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
