"""The papers' experiments on the bundled model, one command each.

    python -m benchmarks.experiments truncation            (a) K steps with gradients
    python -m benchmarks.experiments time_to_reward        against TRL's trainer
    python -m benchmarks.experiments variance              (b) DRaFT-LV's gradient by n
    python -m benchmarks.experiments endpoints             (b) reward by n
    python -m benchmarks.experiments collapse              (c) random K against fixed, long runs
    python -m benchmarks.experiments methods               (d) all methods
    python -m benchmarks.experiments generalisation        (e) prompts never trained on
    python -m benchmarks.experiments overoptimisation      (f) too far on purpose
    python -m benchmarks.experiments ranks                 (g) the LoRA's rank
    python -m benchmarks.experiments mixing                (g) strength, mixing of two rewards
    python -m benchmarks.experiments plot                  every figure again, from the CSVs
    python -m benchmarks.experiments tables                the same in numbers
    python -m benchmarks.experiments truncation --quick    a tiny model, to see that it runs

Each finished run is added to a CSV in benchmarks/results/experiments; a command that is started
again goes on with those that are missing. What the figures say: docs/experiments.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from benchmarks.experiments import (
    collapse,
    endpoints,
    generalisation,
    methods,
    mixing,
    overoptimisation,
    ranks,
    tables,
    time_to_reward,
    truncation,
    variance,
)
from benchmarks.experiments.context import Context
from benchmarks.experiments.size import SIZES

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = {
    "truncation": truncation,
    "time_to_reward": time_to_reward,
    "variance": variance,
    "endpoints": endpoints,
    "collapse": collapse,
    "methods": methods,
    "generalisation": generalisation,
    "overoptimisation": overoptimisation,
    "ranks": ranks,
    "mixing": mixing,
}


def main() -> int:
    """Run an experiment, or draw the figures; 0 when it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="+", choices=(*EXPERIMENTS, "plot", "tables"), metavar="NAME"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="small",
                        help="small is what docs/experiments.md shows")  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the size's")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--results", type=Path, help="folder of the CSVs")
    parser.add_argument("--figures", type=Path, help="folder of the figures")
    parser.add_argument("--work", type=Path, help="folder of adapters, kept for later experiments")
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL 0.23.1")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be 1 at least")
    size = "quick" if args.quick else args.size
    build = ROOT / "build" / "experiments"
    elsewhere = size != "small"
    results = build / size if elsewhere else ROOT / "benchmarks" / "results" / "experiments"
    figures = build / size if elsewhere else ROOT / "docs" / "experiments"
    sizes = SIZES[size]
    if args.dtype:
        sizes = dataclasses.replace(sizes, dtype=args.dtype)
    context = Context(
        sizes,
        range(args.seeds),
        args.results or results,
        args.work or build / "adapters",
        args.trl_python,
    )
    for name in args.names:
        if name == "plot":
            for experiment in EXPERIMENTS.values():
                experiment.plot(context, args.figures or figures)
        elif name == "tables":
            tables.show(context)
        else:
            EXPERIMENTS[name].run(context)
            EXPERIMENTS[name].plot(context, args.figures or figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
