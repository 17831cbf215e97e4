"""The command: see the package's docstring. Exit code 1 where a gate is broken."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.static_gpu import collect, cuda_kernels, gates, report


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile, count and model every GPU kernel.")
    parser.add_argument("--cores", type=int, help="processes to use; all cores if not given")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder to write to")
    parser.add_argument(
        "--operators", nargs="+", help="only these, as a quick look; writes nothing"
    )
    arguments = parser.parse_args()
    console = Console()
    with console.status("recording launches"):
        recorded = collect.record(collect.SCENARIOS)
    if arguments.operators:
        recorded = [one for one in recorded if one[1].case.operator in arguments.operators]
    with Progress(console=console) as progress:
        tasks = {what: progress.add_task(what, total=None) for what in ("compile", "count")}
        found = collect.collect(
            recorded,
            cores=arguments.cores,
            progress=lambda what, done, total: progress.update(
                tasks[what], completed=done, total=total
            ),
        )
    with console.status("compiling CUDA C++"):
        cuda = cuda_kernels.compile_all()
    versions = {
        "triton": version("triton"),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "nvcc": cuda_kernels.version(),
    }
    made = report.build(found, cuda, versions)
    broken = gates.of_report(made)
    if arguments.operators:
        console.print(report.page(made), markup=False)
    else:
        for place in report.write(made, arguments.output):
            console.print(f"written to {place}")
    for one in broken:
        console.print(f"broken gate: {one}", style="red", markup=False, highlight=False)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
