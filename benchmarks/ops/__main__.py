"""Operators on this CPU: `python -m benchmarks.ops`, one row for each case, pass and variant.

Shapes are those of SD 1.5 at 256² and SDXL at 512² (batch 2, as guidance makes it) and of the VAE
decoder at 256². One thread; variants interleaved; a speed-up is the median of the rounds' ratios.
The table weighs each case by how often the network calls it.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.cases import Case, layer_cases
from benchmarks.ops import measure, plot
from benchmarks.timing import speedup
from rewardprop_fast import ops
from rewardprop_fast.ops import native
from rewardprop_fast.training import report
from rewardprop_fast.training.precision import resolve_device

#: network, pixels, batch
NETWORKS = (("sd15", 256, 2), ("sdxl", 512, 2), ("vae", 256, 1))
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def rows_of(case: Case, network: str, dtype: str, arguments: argparse.Namespace) -> list[dict]:
    """One row for each pass and variant."""
    torch.manual_seed(0)
    given = case.make("cpu", DTYPES[dtype])
    functions = measure.variants(case, arguments.compile)
    kept = {
        name: measure.kept_bytes(case, given, function)
        for name, function in functions.items()
        if name != measure.COMPILED  # a compiled function's memory cannot be watched
    }
    timed = measure.time_case(case, given, functions, arguments.rounds)
    torch.compiler.reset()
    return [
        {
            "operator": case.operator,
            "network": network,
            "case": case.name,
            "count": case.count,
            "dtype": dtype,
            "pass": name,
            "variant": variant,
            **timing.summary(),
            "speedup_of_ours": speedup(timing, timings[measure.OURS]),
            "kept_bytes": kept.get(variant, ""),
        }
        for name, timings in timed.items()
        for variant, timing in timings.items()
    ]


def totals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each operator, network, dtype and pass: time of all calls, ours against each variant."""
    keys = dict.fromkeys((r["operator"], r["network"], r["dtype"], r["pass"]) for r in rows)
    found = []
    for key in keys:
        mine = [r for r in rows if (r["operator"], r["network"], r["dtype"], r["pass"]) == key]
        spent = {
            variant: sum(r["count"] * r["p50_ms"] for r in mine if r["variant"] == variant)
            for variant in dict.fromkeys(r["variant"] for r in mine)
        }
        kept = {
            variant: sum(r["count"] * r["kept_bytes"] for r in mine if r["variant"] == variant)
            for variant in spent
            if variant != measure.COMPILED
        }
        found.append(
            {
                **dict(zip(("operator", "network", "dtype", "pass"), key, strict=True)),
                "milliseconds": spent,
                "kept_bytes": kept,
                "speedup": {v: spent[v] / spent[measure.OURS] for v in spent if v != measure.OURS},
            }
        )
    return found


def show(found: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="all calls of a network, times faster than")
    for column in ("operator", "network", "dtype", "pass"):
        table.add_column(column)
    rivals = list(dict.fromkeys(name for row in found for name in row["speedup"]))
    for column in (*rivals, "ms of ours", "kept, MiB", "of eager"):
        table.add_column(column, justify="right")
    for row in found:
        kept = row["kept_bytes"]
        share = f"{kept[measure.OURS] / kept['eager']:.2f}" if kept["eager"] else "-"
        table.add_row(
            *(row[key] for key in ("operator", "network", "dtype", "pass")),
            *(f"{row['speedup'][r]:.2f}" if r in row["speedup"] else "" for r in rivals),
            f"{row['milliseconds'][measure.OURS]:.1f}",
            f"{kept[measure.OURS] / 2**20:.1f}",
            share,
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operators", nargs="+", choices=sorted(ops.OPERATORS), default=None)
    parser.add_argument("--networks", nargs="+", default=[name for name, *_ in NETWORKS])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--keep", action="store_true", help="keep the output's rows of all that is not timed now"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/ops_cpu"))
    arguments = parser.parse_args()
    work = [
        (case, network, dtype)
        for network, pixels, batch in NETWORKS
        if network in arguments.networks
        for case in layer_cases(network, pixels, batch)
        if arguments.operators is None or case.operator in arguments.operators
        for dtype in arguments.dtypes
    ]
    console = Console(width=None if sys.stdout.isatty() else 150)  # a log cuts no column
    rows: list[dict[str, Any]] = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(work))
        for case, network, dtype in work:
            progress.update(task, description=f"{case.operator} {case.name} {dtype}")
            rows += rows_of(case, network, dtype, arguments)
            progress.advance(task)
    if arguments.keep:
        before = json.loads(arguments.output.with_suffix(".json").read_text())
        arguments.rounds = min(arguments.rounds, before["rounds"])  # of each row at least
        rows = [*others(rows, arguments.output), *rows]
    write(rows, arguments)
    show(totals(rows), console)
    console.print(f"written to {arguments.output}.csv, .json and .png")


def others(rows: list[dict[str, Any]], output: Path) -> list[dict[str, Any]]:
    """The rows that an earlier run wrote of other operators, networks and dtypes."""
    new = {(row["operator"], row["network"], row["dtype"]) for row in rows}
    with output.with_suffix(".csv").open() as file:
        old = list(csv.DictReader(file))
    numbers: dict[str, Callable[[str], Any]] = {"count": int, "kept_bytes": int}
    numbers |= dict.fromkeys((name for name in rows[0] if name.endswith("_ms")), float)
    numbers["speedup_of_ours"] = float
    return [
        {name: numbers.get(name, str)(text) if text else text for name, text in row.items()}
        for row in old
        if (row["operator"], row["network"], row["dtype"]) not in new
    ]


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The rows as CSV, their totals with device and versions as JSON, a plot drawn from both."""
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows
        )
    facts = {
        "device": report.device_name(resolve_device("cpu")),
        "instruction_set": _instruction_set(),
        "threads": 1,
        "rounds": arguments.rounds,
        "versions": report.versions(),
        "totals": totals(rows),
    }
    output.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    plot.draw(output.with_suffix(".json"), output.with_suffix(".png"))


def _instruction_set() -> str | None:
    """What the compiled module's loops use; None where it is missing."""
    if native.why_missing() is not None:
        return None
    return str(native.module().isa_report()["selected"])


if __name__ == "__main__":
    main()
