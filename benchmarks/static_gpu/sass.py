"""Reading machine code: registers, spills, tensor-core instructions, asynchronous copies."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?(?:`\(\S+\)|0x([0-9a-f]+))")
_RESOURCES = re.compile(r"Function (\S+?):\s*\n\s*(REG:.*)")

#: Multiply-adds of one warp-wide instruction; a warp-group's (HGMMA) belongs to four warps.
_MMA = re.compile(r"\b(HMMA|HGMMA|IMMA)\.(?:SP\.)?(\d+x\d+x\d+|\d+)")
_WARP_SHAPES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4, "884": 8 * 8 * 4}


@dataclass(frozen=True)
class Machine:
    """What one kernel's machine code uses. Instructions are counted as written, not as run."""

    registers: int
    stack_bytes: int
    spill_instructions: int  # STL and LDL
    tensor_instructions: int
    tensor_instructions_in_loops: int
    tensor_macs: int  # by one warp: multiply-adds of the tensor-core instructions
    async_copies: int  # LDGSTS, or TMA's UTMALDG and UBLKCP


@cache
def _tool(name: str) -> str:
    """Triton brings its own cuobjdump; no CUDA toolkit is needed."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else name


def dump(cubin: Path, *, tool: str | None = None) -> dict[str, Machine]:
    """Kernel name -> what it uses, of every kernel in a cubin."""
    program = tool or _tool("cuobjdump")

    def run(option: str) -> str:
        command = [program, option, str(cubin)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    resources = dict(_RESOURCES.findall(run("-res-usage")))
    code = dict(split_functions(run("-sass")))
    return {name: read(code[name], resources[name]) for name in resources if name in code}


def split_functions(text: str) -> list[tuple[str, str]]:
    """(name, machine code) of each function in cuobjdump's output."""
    parts = re.split(r"^\s*Function : (\S+)\s*$", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def read(code: str, resources: str) -> Machine:
    """Read one kernel's machine code and its line of resource usage."""
    usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources)}
    instructions = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(code)]
    loops = [
        (int(target[1], 16), address)
        for address, text in instructions
        if (target := _BRANCH.search(text)) and target[1] and int(target[1], 16) < address
    ]
    products = [(address, found) for address, text in instructions if (found := _MMA.search(text))]
    in_loops = [a for a, _ in products if any(begin <= a <= end for begin, end in loops)]
    return Machine(
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        spill_instructions=_count(instructions, r"\b(STL|LDL)\b"),
        tensor_instructions=len(products),
        tensor_instructions_in_loops=len(in_loops),
        tensor_macs=sum(_macs(found[1], found[2]) for _, found in products),
        async_copies=_count(instructions, r"\b(LDGSTS|UTMALDG|UBLKCP)\b"),
    )


def _macs(kind: str, shape: str) -> int:
    if "x" in shape:
        return prod(map(int, shape.split("x"))) // (4 if kind == "HGMMA" else 1)
    return _WARP_SHAPES[shape]


def _count(instructions: list[tuple[int, str]], pattern: str) -> int:
    return sum(1 for _, text in instructions if re.search(pattern, text))
