"""What must hold for every kernel, and the exceptions, each with its reason, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.static_gpu.devices import SHARED_LIMITS

#: Bytes moved (modelled) may be this many times the floor.
BYTES_OVER_FLOOR = 1.25

#: Their FLOPs are products, and belong on tensor cores.
PRODUCTS = ("lora_linear", "attention", "frozen_linear", "frozen_conv2d")


@dataclass(frozen=True)
class Exemption:
    """Where a design cannot stay below `BYTES_OVER_FLOOR`, and up to where it then must stay."""

    operator: str
    phase: str
    at_most: float
    reason: str


EXEMPTIONS: tuple[Exemption, ...] = ()


def of_resources(kernel: str, arch: int, num_stages: int, needs: dict[str, Any]) -> list[str]:
    """What is wrong with one configuration on one architecture; ``needs`` as `Resources` has it."""
    where = f"{kernel} on sm_{arch}"
    if needs["problem"] is not None:
        return [f"{where} does not compile: {needs['problem']}"]
    found = []
    if needs["spill_instructions"]:
        found.append(f"{where} spills registers: {needs['spill_instructions']} instructions")
    if needs["shared_bytes"] > SHARED_LIMITS[arch]:
        found.append(
            f"{where} wants {needs['shared_bytes']} bytes of shared memory; "
            f"a block may have {SHARED_LIMITS[arch]}"
        )
    if needs["tensor_macs"] < needs["theory_macs"]:
        found.append(
            f"{where} does {needs['tensor_macs']} multiply-adds a warp on tensor cores; "
            f"its products have {needs['theory_macs']}"
        )
    in_loops = needs["tensor_instructions_in_loops"]
    if num_stages > 1 and in_loops and not needs["async_copies"]:
        found.append(f"{where} has products in a loop, {num_stages} stages, no asynchronous copy")
    return found


def of_pass(row: dict[str, Any]) -> list[str]:
    """What is wrong with one pass of one case on one device; ``row`` as the report writes it."""
    where = f"{row['operator']} {row['phase']} {row['case']} ({row['dtype']}, {row['device']})"
    found = []
    limit = allowed(row["operator"], row["phase"])
    if row["device"] == "RTX 3090" and row["bytes_over_floor"] > limit:
        found.append(f"{where} moves {row['bytes_over_floor']:.2f} times its floor, above {limit}")
    if row["operator"] in PRODUCTS:
        if row["matmul_flops"] < 0.95 * row["flops"]:
            found.append(f"{where} computes part of its products without tl.dot")
        if row["dtype"] != "float32" and row["tensor_flops"] < row["matmul_flops"]:
            found.append(f"{where} has products that tensor cores cannot take")
    return found


def exemption(operator: str, phase: str) -> Exemption | None:
    matching = [e for e in EXEMPTIONS if (e.operator, e.phase) == (operator, phase)]
    return matching[0] if matching else None


def allowed(operator: str, phase: str) -> float:
    """How many times its floor a pass may move."""
    found = exemption(operator, phase)
    return BYTES_OVER_FLOOR if found is None else found.at_most


def of_report(report: dict[str, Any]) -> list[str]:
    """Everything that is wrong in a report."""
    found = []
    for configuration in report["configurations"].values():
        for arch, needs in configuration["resources"].items():
            name, stages = configuration["kernel"], configuration["num_stages"]
            found += of_resources(name, int(arch), stages, needs)
    for row in report["passes"]:
        found += of_pass(row)
    for kernel in report["cuda"]:
        found += of_resources(kernel["kernel"], kernel["arch"], 1, kernel)
    return found
