"""One training step against its peers, raced on this machine.

    python -m benchmarks.peers                                   all of this machine's workloads
    python -m benchmarks.peers --workloads bundled-k1 --repeats 5
    python -m benchmarks.peers --competitors ours loop           without TRL, nothing is installed

Environment, weights and inputs are made once under build/peers. Each competitor first runs alone,
for its gradients and its peak; then those whose gradients agree run in turns. Results are written
after each race: JSON, a Markdown table, a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import assets, flops, race, table
from benchmarks.peers.child import COMPETITORS
from benchmarks.peers.environments import EnvironmentError_, trl_python
from benchmarks.peers.protocol import ROOT, Worker, WorkerError
from benchmarks.peers.workloads import CPU_DEFAULT, GPU_DEFAULT, WORKLOADS, Workload

RESULTS = ROOT / "benchmarks" / "results"
DEFAULT = ("trl", "loop", "loop-checkpoint", "ours", "ours-lean")
GPU_EXTRA = ("loop-compile", "loop-graphs", "loop-xformers")
#: TRL knows SD 1.x alone.
NOT_SDXL = ("trl", "compat")


def main() -> int:
    """Race what the command line names; 0 when every race was run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, metavar="W",
                        help=f"some of {', '.join(WORKLOADS)}")  # fmt: skip
    parser.add_argument("--competitors", nargs="+", choices=COMPETITORS, metavar="C",
                        help=f"some of {', '.join(COMPETITORS)}")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5, help="rounds of a race")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--output", type=Path, help="JSON; .md and .svg go beside it")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL 0.23.1")
    parser.add_argument("--without-tracking", action="store_true", help="no tracked bytes")
    parser.add_argument("--memory", type=float, help="GiB that processes may take together")
    parser.add_argument("--check-trl", action="store_true",
                        help="also the TRL interface against TRL, random truncation")  # fmt: skip
    args = parser.parse_args()
    device = args.device or _device()
    keys = args.workloads or (GPU_DEFAULT if device == "cuda" else CPU_DEFAULT)
    names = list(args.competitors or (*DEFAULT, *(GPU_EXTRA if device == "cuda" else ())))
    pythons = dict.fromkeys(COMPETITORS, sys.executable)
    needs_trl = "trl" in names and any(WORKLOADS[k].model != "sdxl" for k in keys)
    if needs_trl or args.check_trl:
        try:
            pythons["trl"] = args.trl_python or trl_python(args.cache)
        except EnvironmentError_ as error:
            print(error, file=sys.stderr)
            return 1

    def start(competitor: str) -> Worker:
        return Worker(pythons[competitor], competitor, args.threads)

    output = args.output or RESULTS / f"peers_{'gpu' if device == 'cuda' else 'cpu'}.json"
    raced = {key: args.dtypes or _dtypes(WORKLOADS[key], device) for key in keys}
    with start("loop") as worker:
        peaks = worker.ask("gemm", dtypes=sorted({d for own in raced.values() for d in own}))[
            "rates"
        ]
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in peaks.items())
    print(f"GEMM peak: {rates}", flush=True)
    complete = True
    for key in keys:
        workload = WORKLOADS[key]
        if not raced[key]:
            print(f"{workload.title}: left out, this CPU has no bfloat16 instructions", flush=True)
            continue
        job = {**assets.make(workload, args.cache), "device": device}
        operations = flops.count(workload, job["folder"])
        own = [n for n in names if workload.model != "sdxl" or n not in NOT_SDXL]
        try:
            reference = race.reference_gradients(start, workload, job)
        except WorkerError as error:
            print(f"{workload.title}: no reference: {error}", file=sys.stderr)
            complete = False
            continue
        for dtype in raced[key]:
            rows = _race(args, key, {**job, "dtype": dtype}, own, reference, start, device)
            for row in rows:
                row |= {"flop": operations, "gemm_peak": peaks[dtype], "threads": args.threads}
                if row.get("median"):
                    row["share"] = operations["total"] / row["median"] / peaks[dtype]
            _write(output, rows, device)
            print(table.table(rows), flush=True)
        if args.check_trl and workload.model != "sdxl":
            seeds = (1, 2, 3)
            errors = race.random_truncation(start, {**job, "dtype": "float32"}, seeds)
            words = ", ".join(f"{error:.1e}" for error in errors)
            agree = max(errors) <= race.FLOOR["float32"]
            complete &= agree
            print(f"{workload.title}: TRL's interface against TRL, random truncation, eta 1, "
                  f"float32: {words} ({'agree' if agree else 'DISAGREE'})")  # fmt: skip
            _note(output, key, errors)
    return 0 if complete else 1


def _race(
    args: argparse.Namespace,
    key: str,
    job: dict[str, Any],
    names: list[str],
    reference: list[dict[str, Any]],
    start: Any,
    device: str,
) -> list[dict[str, Any]]:
    workload: Workload = WORKLOADS[key]
    dtype = job["dtype"]
    print(f"\n{workload.title}, {dtype}", flush=True)
    entries = [race.Entry(name) for name in names]
    limit = args.memory * race.GIB if args.memory else 0.8 * _available(device)
    pool = race.Pool(start, job, limit)
    try:
        for entry in entries:
            began = time.perf_counter()
            race.alone(pool, entry, reference, not args.without_tracking)
            words = entry.failed or (
                f"gradient error {entry.error:.1e}, cosine {entry.cosine:.6f}, peak "
                f"{entry.step_peak / race.GIB:.2f} GiB ({entry.process_peak / race.GIB:.2f} whole)"
            )
            print(f"  {entry.competitor}: {words}; {time.perf_counter() - began:.0f} s", flush=True)
        race.judge(entries, dtype)
        race.interleave(pool, entries, args.repeats)
    finally:
        pool.close()
    common = {"workload": key, "title": workload.title, "dtype": dtype, "device": device}
    return [{**common, **entry.to_dict()} for entry in entries]


def _dtypes(workload: Workload, device: str) -> tuple[str, ...]:
    """What is raced unless somebody asks: no bfloat16 on a CPU that takes hours for it."""
    from rewardprop_fast.training.precision import cpu_has_fast_bf16

    if device == "cuda" or cpu_has_fast_bf16():
        return workload.dtypes
    return tuple(dtype for dtype in workload.dtypes if dtype != "bfloat16")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _available(device: str) -> float:
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        return float(free)
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = next(line for line in lines if line.startswith("MemAvailable"))
    return 1024.0 * int(found.split()[1])


def _write(output: Path, rows: list[dict[str, Any]], device: str) -> None:
    data = _read(output)
    data["machine"] = _machine(device)
    data["rows"] = table.merge(data["rows"], rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(data, indent=1) + "\n")
    output.with_suffix(".md").write_text(table.table(data["rows"]) + "\n")
    table.plot(data["rows"], output.with_suffix(".svg"))


def _note(output: Path, key: str, errors: list[float]) -> None:
    data = _read(output)
    data.setdefault("trl_interface_random_truncation", {})[key] = errors
    output.write_text(json.dumps(data, indent=1) + "\n")


def _read(output: Path) -> dict[str, Any]:
    if not output.is_file():
        return {"rows": []}
    data: dict[str, Any] = json.loads(output.read_text())
    return data


def _machine(device: str) -> dict[str, Any]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    machine = {"cpu": name, "cores": os.cpu_count(), "python": platform.python_version()}
    if device == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return machine


if __name__ == "__main__":
    sys.exit(main())
