"""The command: see the package's docstring."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks.gpu_check import table
from benchmarks.gpu_check.device import DEVICES
from benchmarks.gpu_check.jobs import DTYPES, Job, listed, load
from benchmarks.gpu_check.runner import Limits, Worker, WorkerFailed, run_all
from rewardprop_fast.training import report as training_report

RESULTS = Path("benchmarks/results")

#: Files are written again after so many seconds, and at the end.
_WRITE_EVERY = 2.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Check and time every operator on the NVIDIA GPU of this machine.",
    )
    made.add_argument("--only", help="regular expression; jobs that it is found in ('attention')")
    made.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    made.add_argument("--no-timing", action="store_true", help="correctness alone")
    made.add_argument("--no-checks", action="store_true", help="timing alone")
    made.add_argument("--timeout", type=float, default=300.0, help="seconds one job may take")
    made.add_argument("--output", type=Path, default=RESULTS, help="folder to write to")
    # For tests: another device in a GPU's place, other cases.
    made.add_argument("--device", choices=tuple(DEVICES), default="cuda", help=argparse.SUPPRESS)
    made.add_argument(
        "--source", default="benchmarks.gpu_check.jobs:groups", help=argparse.SUPPRESS
    )
    return made


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    console = Console()
    device = DEVICES[arguments.device]()
    missing = device.why_missing()
    if missing is not None:
        console.print(missing, highlight=False, markup=False, soft_wrap=True)
        return 2
    jobs = _jobs(arguments)
    if not jobs:
        console.print("no job matches --only, --dtypes, --no-checks and --no-timing")
        return 1
    described = {**device.describe(), "driver, power limit": _driver() or "unknown"}
    report: dict[str, Any] = {
        "device": described,
        "versions": _versions(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "jobs": len(jobs),
        "finished": False,
        "modelled": table.modelled_for(described["name"], RESULTS / "static_gpu.json"),
        "rows": [],
    }
    try:
        _run(jobs, arguments, report, console)
        report["finished"] = True
    except WorkerFailed as error:
        console.print(f"[red]stopped:[/red] {error}", highlight=False)
    except KeyboardInterrupt:
        console.print("[red]interrupted[/red]; what there is so far is written")
    places = table.write(report, arguments.output)
    return _conclude(report, places, console)


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    found = listed(load(arguments.source), arguments.device, tuple(arguments.dtypes))
    left_out = {"check": arguments.no_checks, "time": arguments.no_timing}
    pattern = re.compile(arguments.only or "")
    return [job for job in found if not left_out[job.kind] and pattern.search(str(job))]


def _run(
    jobs: list[Job], arguments: argparse.Namespace, report: dict[str, Any], console: Console
) -> None:
    limits = Limits(start=max(arguments.timeout, 60.0), job=arguments.timeout)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    written = time.monotonic()
    with (
        Worker(arguments.device, arguments.source, limits) as worker,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task("starting", total=len(jobs))
        for index, outcome in enumerate(run_all(jobs, worker)):
            report["rows"].append(table.record(outcome))
            if outcome.failed:
                first = outcome.message.partition("\n")[0]
                progress.console.print(
                    f"{outcome.status}: {outcome.job}: {first}", style="red", markup=False
                )
            following = jobs[index + 1] if index + 1 < len(jobs) else "done"
            progress.update(task, advance=1, description=str(following)[:60])
            if time.monotonic() - written > _WRITE_EVERY:
                table.write(report, arguments.output)
                written = time.monotonic()


def _conclude(report: dict[str, Any], places: tuple[Path, Path], console: Console) -> int:
    failed = sum(row["failed"] for row in report["rows"])
    passed = sum(row["status"] == "passed" for row in report["rows"])
    console.print(
        f"{passed} passed, {failed} failed, {len(report['rows'])} of {report['jobs']} jobs run",
        highlight=False,
    )
    for place in places:
        console.print(f"written to {place}", highlight=False, soft_wrap=True)
    return 0 if report["finished"] and passed and not failed else 1


def _versions() -> dict[str, str]:
    found = training_report.versions()
    for package in ("triton", "xformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _driver() -> str:
    """The driver's version and the card's power limit, as nvidia-smi says; "" if it does not."""
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
