"""Training steps of the bundled model by method and dtype: `python -m benchmarks.quick`.

The variants are interleaved (A B C A B C ...), so that a machine that slows down slows all of them;
minimum and median of the repeats are reported. Peak memory is that of the whole process, so it is
given once.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import rewardprop_fast as rpf
from rewardprop_fast.methods import Method
from rewardprop_fast.rewards import build
from rewardprop_fast.training import report
from rewardprop_fast.training.precision import resolve_device

METHODS: dict[str, Method] = {
    "DRaFT-1": rpf.DRaFT(k=1),
    "DRaFT-5": rpf.DRaFT(k=5),
    "DRaFT-LV n=2": rpf.DRaFTLV(n=2),
    "AlignProp K~U(1,T)": rpf.AlignProp(),
}


def trainer(method: Method, dtype: str, arguments: argparse.Namespace) -> rpf.RewardPropTrainer:
    config = rpf.TrainConfig(
        method=method,
        sampling=rpf.SamplingConfig(steps=arguments.sampling_steps, guidance_scale=5.0),
        steps=1000,
        batch_size=arguments.batch_size,
        dtype=dtype,
    )
    return rpf.RewardPropTrainer(
        rpf.models.load_bundled(), build("style", style="fluent"), "bundled", config
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    dtypes = [dtype for dtype in ("float32", "bfloat16") if dtype in arguments.dtypes]
    trainers = {
        (name, dtype): trainer(method, dtype, arguments)
        for name, method in METHODS.items()
        for dtype in dtypes
    }
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in trainers}
    for repeat in range(arguments.repeats + 1):  # the first one warms up
        for key, one in trainers.items():
            row = one.update()
            if repeat:
                rows[key].append(row)
    device = resolve_device("auto")
    return {
        "device": report.device_name(device),
        "threads": torch.get_num_threads(),
        "versions": report.versions(),
        "settings": vars(arguments) | {"output": str(arguments.output)},
        "peak_memory_bytes": report.peak_memory_bytes(device),
        "rows": [
            {
                "method": name,
                "dtype": dtype,
                "seconds_min": min(row["seconds"] for row in found),
                "seconds_median": statistics.median(row["seconds"] for row in found),
                **{
                    f"seconds_{phase}_median": statistics.median(
                        row.get(f"seconds_{phase}", 0.0) for row in found
                    )
                    for phase in report.PHASES
                },
            }
            for (name, dtype), found in rows.items()
        ],
    }


def show(found: dict[str, Any]) -> None:
    table = Table(title=f"seconds per training step, {found['device']}")
    for column in ("method", "dtype", "min", "median", *report.PHASES):
        named = column in ("method", "dtype")
        table.add_column(column, justify="left" if named else "right", no_wrap=True)
    for row in found["rows"]:
        phases = [f"{row[f'seconds_{phase}_median']:.3f}" for phase in report.PHASES]
        table.add_row(
            row["method"],
            row["dtype"],
            f"{row['seconds_min']:.3f}",
            f"{row['seconds_median']:.3f}",
            *phases,
        )
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log has room; rich would cut the columns to 80
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quick.json"))
    arguments = parser.parse_args()
    found = measure(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    show(found)
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
