"""Compiling a configuration ahead of time for a GPU that is not there, and reading what it uses."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.static_gpu import sass
from benchmarks.static_gpu.signature import Configuration

#: Compiled results are kept here, by everything that they depend on.
CACHE = Path("build/static_gpu")

_DOT = re.compile(
    r"(?:tt\.dot|ttng\.warp_group_dot)\b.*?:\s*"
    r"!?(?:tensor|ttg\.memdesc)<([\dx]+)x(\w+),.*?->\s*tensor<([\dx]+)x\w+,"
)
_TF32 = re.compile(r"inputPrecision = (tf32|0)\b")


@dataclass(frozen=True)
class Resources:
    """What one configuration needs on one architecture; ``problem`` if it does not compile."""

    arch: int
    registers: int = 0
    spill_instructions: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    dots: int = 0  # tl.dot with operands for tensor cores
    theory_macs: int = 0  # multiply-adds of these dots for one warp, as written in the kernel
    tensor_macs: int = 0  # those of the machine code's tensor-core instructions
    theory_instructions: float = 0.0  # theory_macs in instructions of the machine code's own shape
    tensor_instructions: int = 0
    tensor_instructions_in_loops: int = 0
    async_copies: int = 0
    problem: str | None = None


def resources(configuration: Configuration, arch: int, cache_folder: Path = CACHE) -> Resources:
    """Compile for ``arch`` (86 is compute capability 8.6) or take the result of an earlier run."""
    source, target, options = _inputs(configuration, arch)
    place = cache_folder / f"{_key(source, target, options)}.json"
    if place.exists():
        return Resources(**json.loads(place.read_text()))
    found = _compile(configuration, source, target, options, arch)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_suffix(f".{id(found)}.part")
    partial.write_text(json.dumps(asdict(found)))
    partial.replace(place)
    return found


def _inputs(configuration: Configuration, arch: int) -> tuple[Any, Any, dict[str, int]]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = configuration.function()
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in configuration.aligned
    }
    source = ASTSource(kernel, configuration.signature, configuration.constexprs, attributes)
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    return source, GPUTarget("cuda", arch, 32), options


def _compile(
    configuration: Configuration, source: Any, target: Any, options: dict[str, int], arch: int
) -> Resources:
    import triton

    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:  # any refusal is a result: the gate reports it
        return Resources(arch, problem=f"{type(error).__name__}: {error}".strip()[:500])
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (machine,) = sass.dump(cubin).values()
    dots, macs = theory(compiled.asm["ttgir"])
    theory_macs = macs // configuration.num_warps
    each = machine.tensor_macs / machine.tensor_instructions if machine.tensor_instructions else 0
    return Resources(
        arch=arch,
        registers=machine.registers,
        spill_instructions=machine.spill_instructions,
        stack_bytes=machine.stack_bytes,
        shared_bytes=compiled.metadata.shared,
        dots=dots,
        theory_macs=theory_macs,
        tensor_macs=machine.tensor_macs,
        theory_instructions=theory_macs / each if each else 0.0,
        tensor_instructions=machine.tensor_instructions,
        tensor_instructions_in_loops=machine.tensor_instructions_in_loops,
        async_copies=machine.async_copies,
    )


def theory(ttgir: str) -> tuple[int, int]:
    """Dots whose operands tensor cores can take, and their multiply-adds, once each as written.

    float32 operands with "ieee" precision are computed without tensor cores, on purpose.
    """
    dots = macs = 0
    for line in ttgir.splitlines():
        found = _DOT.search(line)
        if found is None or (found[2] == "f32" and not _TF32.search(line)):
            continue
        *_, depth = map(int, found[1].split("x"))
        size = depth
        for extent in found[3].split("x"):
            size *= int(extent)
        dots, macs = dots + 1, macs + size
    return dots, macs


def _key(source: Any, target: Any, options: dict[str, int]) -> str:
    parts = (source.hash(), str(target), str(sorted(options.items())), _tools())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def _tools() -> str:
    """Triton's version and this reading of its output."""
    import triton

    readers = (Path(__file__), Path(sass.__file__))
    return triton.__version__ + "".join(reader.read_text(encoding="utf-8") for reader in readers)
