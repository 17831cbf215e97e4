"""What must hold for every kernel, and the exceptions, each with its reason, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.static_gpu.devices import SHARED_LIMITS

#: Bytes moved (modelled) on the reference card may be this many times the floor. It has the
#: smallest second-level cache, so the others move no more.
BYTES_OVER_FLOOR, REFERENCE = 1.25, "RTX 3090"

#: Their FLOPs are products, and belong on tensor cores.
PRODUCTS = ("lora_linear", "attention", "frozen_linear", "frozen_conv2d")


@dataclass(frozen=True)
class Exemption:
    """Where a design cannot stay below `BYTES_OVER_FLOOR`, and up to where it then must stay.

    It holds for passes that launch ``kernel``, in cases whose name contains ``case``. Where bytes
    are said not to decide the time, ``bound`` is "compute", and the pass must be bound so.
    """

    operator: str
    phase: str
    kernel: str
    at_most: float
    reason: str
    case: str = ""
    bound: str = ""

    def covers(self, row: dict[str, Any]) -> bool:
        """``row`` is a pass as the report writes it."""
        return (
            (row["operator"], row["phase"]) == (self.operator, self.phase)
            and self.kernel in row["kernels"]
            and self.case in row["case"]
            and self.bound in row["bound"]
        )


_PRODUCTS_DECIDE = "Bound by its products, modelled: the bytes take less than 55 % of its time. "

EXEMPTIONS: tuple[Exemption, ...] = (
    Exemption(
        "group_norm_silu",
        "forward",
        "moments_kernel",
        1.64,
        "A group larger than one program's registers is read twice, for its statistics and for the "
        "output: 3u, where L2 does not hold x. One reading would need programs that wait for each "
        "other. Of the forms, the CUDA C++ one holds larger groups and is preferred where built.",
    ),
    Exemption(
        "group_norm_silu",
        "backward",
        "sums_kernel",
        1.78,
        "As forward, with x and the gradient read twice: 5u instead of 3u.",
    ),
    Exemption(
        "attention",
        "backward",
        "backward_resident_kernel",
        1.37,
        _PRODUCTS_DECIDE + "Each group of queries writes its part of dK and dV in float32, and a "
        "second kernel adds them, since there are no atomics; their number is not fitted to the "
        "GPU.",
        bound="compute",
    ),
    Exemption(
        "attention",
        "forward",
        "forward_kernel",
        3.65,
        _PRODUCTS_DECIDE + "A head of 512 allows tiles of 32 queries, and its keys and values (up "
        "to 32 MiB) leave L2 between waves, so each wave of tiles reads them again.",
        case="D512",
        bound="compute",
    ),
    Exemption(
        "attention",
        "backward",
        "grad_keys_kernel",
        5.85,
        _PRODUCTS_DECIDE + "As forward, for tiles of 16 keys and of 32 queries.",
        case="D512",
        bound="compute",
    ),
    Exemption(
        "attention",
        "backward",
        "grad_keys_kernel",
        1.87,
        _PRODUCTS_DECIDE + "Without atomics dQ and dK, dV come from two kernels, which read q, k, "
        "v and dO each, after a third that reads O and dO: 13u at least instead of 8u.",
        bound="compute",
    ),
    Exemption(
        "lora_linear",
        "forward",
        "project_kernel",
        2.25,
        _PRODUCTS_DECIDE + "From N = 1280 on S is computed first, so x is read once more, and the "
        "tiles of x and W that run together are larger than L2, so each wave reads them again.",
        bound="compute",
    ),
    Exemption(
        "lora_linear",
        "backward",
        "low_kernel",
        2.28,
        _PRODUCTS_DECIDE + "As forward, with T computed first; dB then reads dY a third time, "
        "which is less than its partial sums in float32 for each of the low row blocks.",
        bound="compute",
    ),
    Exemption(
        "lora_linear",
        "backward",
        "fused_kernel",
        1.44,
        _PRODUCTS_DECIDE + "dA and dB are added up without atomics: their parts, in float32 for "
        "each block of 128 rows, are written and read; rank 16 of three layers makes that 2u.",
        bound="compute",
    ),
)


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
    limit = allowed(row)
    if row["device"] == REFERENCE and row["bytes_over_floor"] > limit:
        found.append(f"{where} moves {row['bytes_over_floor']:.2f} times its floor, above {limit}")
    if row["operator"] in PRODUCTS:
        if row["matmul_flops"] < 0.95 * row["flops"]:
            found.append(f"{where} computes part of its products without tl.dot")
        if row["dtype"] != "float32" and row["tensor_flops"] < row["matmul_flops"]:
            found.append(f"{where} has products that tensor cores cannot take")
    return found


def exemption(row: dict[str, Any]) -> Exemption | None:
    """The first that covers the pass."""
    return next((one for one in EXEMPTIONS if one.covers(row)), None)


def allowed(row: dict[str, Any]) -> float:
    """How many times its floor a pass may move."""
    found = exemption(row)
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
