"""The tables of docs/experiments.md, from the CSVs: mean ± standard deviation over seeds."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.experiments import (
    figures,
    generalisation,
    long_runs,
    methods,
    overoptimisation,
    ranks,
    time_to_reward,
)
from benchmarks.experiments.context import Context

GAUGES = ("reward", "heldout", "alignment", "recognised", "diversity")


def cell(values: list[float], digits: int = 2) -> str:
    """Mean ± standard deviation."""
    mean, deviation = figures.spread(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def cells_of(rows: Any, gauge: str) -> str:
    """The gauge's cell; empty where the runs did not have it."""
    return cell([float(r[gauge]) for r in rows]) if rows[0].get(gauge) else ""


def ends(rows: Any, column: str = "variant") -> str:
    """Where the runs ended, a line for each variant."""
    lines = [
        "| | runs | learning rate | images | s of one core | " + " | ".join(GAUGES) + " | drift |",
        "|---|---:|---:|---:|---:|" + "---:|" * (len(GAUGES) + 1),
    ]
    for name, group in figures.by(rows, column).items():
        final = figures.last(group)
        cells = [
            figures.TITLES.get(name, name),
            str(len(final)),
            final[0]["learning_rate"],
            final[0]["samples"],
            cell([float(r["cpu_seconds"]) for r in final], 0),
            *(cells_of(final, gauge) for gauge in GAUGES),
            cell([float(r["drift"]) for r in final]) if final[0].get("drift") else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_ddpo(context: Context) -> str:
    """How many times more images and seconds DDPO takes; least, middle and most of all pairs."""
    rows = context.store("runs").rows()
    lines = ["| DDPO takes times more of | to its best | pairs | least | median | most |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for unit in ("samples", "cpu_seconds"):
        for gauge in ("reward", "heldout"):
            for name, ratios in methods.factors(rows, gauge, unit).items():
                if not ratios:
                    continue
                middle = statistics.median(ratios)
                numbers = f"{min(ratios):.0f} | {middle:.0f} | {max(ratios):.0f}"
                what = f"{unit}, against {figures.TITLES[name]}"
                lines.append(f"| {what} | {gauge} | {len(ratios)} | {numbers} |")
    return "\n".join(lines)


def times(context: Context, level: float) -> str:
    """Seconds to a held-out reward."""
    lines = [f"| s of one core to {level:g} | runs that got there | mean ± sd |", "|---|---:|---:|"]
    for name, found in time_to_reward.summary(context, level).items():
        there = [value for value in found if value is not None]
        words = cell(there, 1) if there else ""
        lines.append(f"| {figures.TITLES[name]} | {len(there)} of {len(found)} | {words} |")
    return "\n".join(lines)


def show(context: Context) -> None:
    """Print them all."""
    for name in ("runs", "trl"):
        if rows := context.store(name).rows():
            print(f"{name}\n{ends(rows)}\n")
    if rows := context.store("endpoints").rows():
        print(f"endpoints\n{ends(rows)}\n")
    print(against_ddpo(context) + "\n")
    for level in (-2.0, time_to_reward.LEVEL):
        print(times(context, level) + "\n")
    for weights, group in figures.by(context.store("gradient_by_depth").rows(), "weights").items():
        print(f"gradient by depth, {weights}")
        for k, rows in figures.by(group, "k").items():
            norms = [[float(r[name]) for r in rows] for name in ("norm", "contribution")]
            print(k, *(f"{statistics.fmean(n):.3g} ± {figures.spread(n)[1]:.2g}" for n in norms))
    variance = context.store("variance").rows()
    first = {r["seed"]: float(r["trace"]) for r in variance if r["n"] == "0"}
    timed = figures.by(context.store("variance_seconds").rows(), "n")
    for n, rows in figures.by(variance, "n").items():
        shares = [float(r["trace"]) / first[r["seed"]] for r in rows]
        signal = [float(r["mean_squared"]) / float(r["trace"]) for r in rows]
        seconds = [float(r["cpu_seconds"]) for r in timed.get(n, [])] or [float("nan")]
        print(f"n={n}: trace {cell(shares, 3)}, {cell(seconds)} s, |mean|²/trace {cell(signal, 3)}")
    for prompts, group in figures.by(context.store("generalisation").rows(), "prompts").items():
        print(f"generalisation, {prompts}")
        for name, rows in figures.by(group, "variant").items():
            print(name, *words(rows, GAUGES))
            if name != "base":
                changes = (f"{g} {cell(generalisation.gains(group, name, g))}" for g in GAUGES)
                print("  change", *changes)
    for name, group in figures.by(context.store(long_runs.TABLE).rows(), "variant").items():
        for step, rows in figures.by(group, "step").items():
            print(f"long, {name}, update {step}:", *words(rows, (*GAUGES, "drift")))
        print(signals(group))
    for rank, rows in sorted(figures.by(ranks.rows_of(context), "rank").items()):
        print(f"rank {rank}:", *words(rows, (*GAUGES, "drift", "cpu_seconds")))
    for kind, group in figures.by(context.store("mixing").rows(), "kind").items():
        for x, rows in figures.by(group, "x").items():
            print(f"{kind} {x}:", *words(rows, (*GAUGES, "second", "error")))


def words(rows: Any, gauges: tuple[str, ...]) -> list[str]:
    """The gauges that the rows have, in words."""
    return [f"{gauge} {cells_of(rows, gauge)}" for gauge in gauges if rows[0].get(gauge)]


def signals(rows: Any) -> str:
    """At which update the pictures of each run were broken, and each signal fired."""
    names = {"broken": overoptimisation.broken, **overoptimisation.SIGNALS}
    runs = figures.by(rows, "seed").values()
    return "\n".join(
        f"  {name}: {[overoptimisation.fires(one, signal) for one in runs]}"
        for name, signal in names.items()
    )
