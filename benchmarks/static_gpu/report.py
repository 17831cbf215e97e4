"""The figures as JSON and CSV, and one page of tables made from them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.static_gpu import cuda_kernels, gates, sources
from benchmarks.static_gpu.collect import Found, Row
from benchmarks.static_gpu.devices import DEVICES, SHARED_LIMITS

RESULTS = Path("benchmarks/results")
_ARCHES = tuple(SHARED_LIMITS)


def build(found: Found, cuda: list[dict[str, Any]], versions: dict[str, Any]) -> dict[str, Any]:
    """Everything as plain data; seconds and bytes in it are modelled."""
    return {
        "made_by": sources.COMMAND,
        "versions": versions,
        "sources": sources.hashes(),
        "devices": [asdict(device) for device in DEVICES],
        "configurations": {
            key: {
                "operators": sorted(found.operators[key]),
                "module": one.module,
                "kernel": one.kernel,
                "signature": one.signature,
                "aligned": list(one.aligned),
                "constexprs": {name: _plain(value) for name, value in one.constexprs.items()},
                "num_warps": one.num_warps,
                "num_stages": one.num_stages,
                "resources": {
                    str(arch): asdict(found.resources[key, arch])
                    for arch in _ARCHES
                    if (key, arch) in found.resources
                },
            }
            for key, one in sorted(found.configurations.items(), key=_place)
        },
        "passes": [_pass(row) for row in found.rows],
        "cuda": cuda,
    }


def _place(item: tuple[str, Any]) -> tuple[str, ...]:
    key, one = item
    return (one.module, one.kernel, str(one.constexprs), key)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _pass(row: Row) -> dict[str, Any]:
    one = row.recorded
    floor = one.case.cost(one.dtype)[0 if one.phase == "forward" else 1]
    return {
        "operator": one.case.operator,
        "phase": one.phase,
        "scenario": row.scenario,
        "case": one.case.name,
        "count": one.case.count,
        "dtype": str(one.dtype).removeprefix("torch."),
        "device": row.device.name,
        "microseconds": round(1e6 * row.seconds, 3),
        "bound": row.bound,
        "flops": floor.flops,
        "matmul_flops": row.matmul_flops,
        "tensor_flops": row.tensor_flops,
        "floor_bytes": round(floor.floor_bytes),
        "moved_bytes": round(row.bytes_moved),
        "floor_units": round(floor.floor_units, 3),
        "moved_units": round(row.bytes_moved / floor.unit_bytes, 3),
        "bytes_over_floor": round(row.bytes_moved / floor.floor_bytes, 3),
        "floor_microseconds": round(1e6 * floor.floor_bytes / row.device.bandwidth, 3),
        "launches": [launch.configuration.key for launch in one.launches],
        "blocks_per_multiprocessor": [launch.blocks_per_multiprocessor for launch in row.modelled],
        "waves": [round(launch.waves, 2) for launch in row.modelled],
    }


def write(report: dict[str, Any], folder: Path = RESULTS) -> list[Path]:
    """static_gpu.json, .csv and .md; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    places = [folder / f"static_gpu.{kind}" for kind in ("json", "csv", "md")]
    places[0].write_text(_json(report), encoding="utf-8")
    with places[1].open("w", newline="", encoding="utf-8") as file:
        if report["passes"]:
            writer = csv.DictWriter(file, report["passes"][0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
                for row in report["passes"]
            )
    places[2].write_text(page(report), encoding="utf-8")
    return places


def read(folder: Path = RESULTS) -> dict[str, Any]:
    """The committed figures."""
    report: dict[str, Any] = json.loads((folder / "static_gpu.json").read_text(encoding="utf-8"))
    return report


def _json(report: dict[str, Any]) -> str:
    """A line for each row, so that changes can be seen in a diff."""
    parts = []
    for key, value in report.items():
        if isinstance(value, list) and value:
            rows = ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in value)
            parts.append(f"  {json.dumps(key)}: [\n    {rows}\n  ]")
        elif key == "configurations":
            rows = ",\n    ".join(
                f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items()
            )
            parts.append(f"  {json.dumps(key)}: {{\n    {rows}\n  }}")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


# --- the page ---


def page(report: dict[str, Any]) -> str:
    """Markdown."""
    operators = sorted({row["operator"] for row in report["passes"]})
    parts = [
        "# GPU kernels without a GPU: compiled, counted, modelled",
        f"Generated by `{report['made_by']}`; do not edit. No figure here was measured on a GPU.",
        _versions(report["versions"]),
        _devices(report),
        _gates(report),
        "## Modelled time and bytes",
        _explanation(),
        *(_operator(report, operator) for operator in operators),
        "## Triton kernels: what the compiler made",
        _legend(),
        *(_kernels(report, operator) for operator in operators),
        _cuda(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]], left: int = 1) -> str:
    head = list(head)
    lines = [head, ["---" if i < left else "---:" for i in range(len(head))]]
    lines += [[str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _versions(versions: dict[str, Any]) -> str:
    return "Versions: " + ", ".join(f"{name} {value}" for name, value in versions.items()) + "."


def _devices(report: dict[str, Any]) -> str:
    rows = [
        (
            d["name"],
            f"{d['arch'] // 10}.{d['arch'] % 10}",
            d["multiprocessors"],
            f"{d['peak_16bit'] / 1e12:.0f}",
            f"{d['bandwidth'] / 1e9:.0f}",
            f"{d['l2_bytes'] / 2**20:.0f}",
            f"{d['shared_per_block'] / 2**10:.0f}",
        )
        for d in report["devices"]
    ]
    head = ("device", "capability", "SMs", "TFLOP/s 16-bit", "GB/s", "L2 MiB", "KiB a block")
    return "Limits, from NVIDIA's documents (benchmarks/static_gpu/devices.py):\n\n" + table(
        head, rows
    )


def _gates(report: dict[str, Any]) -> str:
    broken = gates.of_report(report)
    lines = [
        "## Gates",
        "No spills; at most 99 KiB of shared memory a block on 8.6 and 8.9; all multiply-adds of "
        "products of 16-bit numbers on tensor cores; asynchronous copies where loads are "
        f"pipelined; bytes on the RTX 3090 at most {gates.BYTES_OVER_FLOOR} times the floor. "
        "Exceptions to the last:",
        table(
            ("operator", "pass", "at most", "reason"),
            ((e.operator, e.phase, f"{e.at_most} x", e.reason) for e in gates.EXEMPTIONS),
        )
        if gates.EXEMPTIONS
        else "none.",
        "All hold." if not broken else "**Broken:**\n\n" + "\n".join(f"- {one}" for one in broken),
    ]
    return "\n\n".join(lines)


def _explanation() -> str:
    return (
        "Modelled: max(FLOP / peak, bytes / bandwidth) of each launch, stretched where the grid "
        "does not fill the device evenly, summed over the launches; launch latency is left out. "
        "Bytes are counted by running some programs of each launch in Triton's interpreter on "
        "addresses alone (benchmarks/static_gpu/traffic.py, model.py). u is one activation tensor "
        "read or written once; the floor moves every tensor once. n: calls in one forward pass. "
        "floor, moved and ratio are for the RTX 3090. Times in µs; c: bound by compute, m: by "
        "memory."
    )


def _operator(report: dict[str, Any], operator: str) -> str:
    rows = [row for row in report["passes"] if row["operator"] == operator]
    names = [device.name for device in DEVICES]
    by_case: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["scenario"], row["case"], row["dtype"], row["phase"])
        by_case.setdefault(key, {})[row["device"]] = row
    cells = []
    for (scenario, case, dtype, phase), found in by_case.items():
        if dtype != "bfloat16":
            continue
        first = found[names[0]]
        times = [
            f"{found[n]['microseconds']:.1f} {found[n]['bound'][0]}" for n in names if n in found
        ]
        cells.append(
            (
                scenario,
                case,
                first["count"],
                phase,
                f"{first['floor_units']:.2f}",
                f"{first['moved_units']:.2f}",
                f"{first['bytes_over_floor']:.2f}",
                *times,
            )
        )
    head = ("network", "case", "n", "pass", "floor u", "moved u", "ratio", *names)
    return f"### {operator}, bfloat16\n\n" + table(head, cells, 2)


def _legend() -> str:
    return (
        "One row per kernel and set of compile-time values. Several numbers in a cell are those of "
        "the architectures in the column sm, in this order; one number holds for all of them. "
        "MMA: tensor-core instructions of a warp as written in the machine code, those in loops, "
        "and what the tiles of its products need; more than needed means an unrolled loop or "
        "repeated work. copies: asynchronous copies, as written."
    )


def _kernels(report: dict[str, Any], operator: str) -> str:
    rows = []
    for one in report["configurations"].values():
        if operator not in one["operators"]:
            continue
        found = [one["resources"][str(a)] for a in _ARCHES if str(a) in one["resources"]]
        rows.append(
            (
                one["kernel"],
                _constants(one),
                f"{one['num_warps']}/{one['num_stages']}",
                " ".join(str(a) for a in _ARCHES if str(a) in one["resources"]),
                _each(f["registers"] for f in found),
                _each(f["spill_instructions"] for f in found),
                _each(f"{f['shared_bytes'] / 1024:.1f}" for f in found),
                _each(
                    f"{f['tensor_instructions']}, {f['tensor_instructions_in_loops']}, "
                    f"{f['theory_instructions']:g}"
                    if f["dots"]
                    else "-"
                    for f in found
                ),
                _each(f["async_copies"] for f in found),
            )
        )
    head = (
        "kernel",
        "compile-time values",
        "warps/stages",
        "sm",
        "registers",
        "spills",
        "shared KiB",
        "MMA, in loops, theory",
        "copies",
    )
    return f"### {operator}\n\n" + table(head, rows, 2)


def _constants(one: dict[str, Any]) -> str:
    kinds = sorted({k for k in one["signature"].values() if k.startswith("*")})
    values = (f"{name}={value}" for name, value in one["constexprs"].items())
    return ", ".join([*(k.removeprefix("*") for k in kinds), *values])


def _each(values: Iterable[Any]) -> str:
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " · ".join(texts)


def _cuda(report: dict[str, Any]) -> str:
    if not report["cuda"]:
        return ""
    by_kernel: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["cuda"]:
        by_kernel.setdefault((row["file"], row["kernel"]), []).append(row)
    rows = [
        (
            file,
            f"`{kernel}`",
            _each(f["registers"] for f in found),
            _each(f["spill_instructions"] for f in found),
            _each(f"{f['shared_bytes'] / 1024:.1f}" for f in found),
        )
        for (file, kernel), found in by_kernel.items()
    ]
    head = ("file", "kernel", "registers", "spills", "static shared KiB")
    version = cuda_kernels.version() or report["versions"].get("nvcc")
    return f"## CUDA C++ kernels, nvcc {version}\n\n" + table(head, rows, 2)
