"""The CUDA C++ kernels: compiled by nvcc for each architecture, where it is installed, and read."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.static_gpu import sass, sources
from benchmarks.static_gpu.compiling import CACHE
from benchmarks.static_gpu.devices import SHARED_LIMITS
from benchmarks.static_gpu.sources import ROOT

#: Optimised and rounded as csrc/cuda/CMakeLists.txt says.
_OPTIONS = ("-O3", "-std=c++17", "--fmad=false", "--resource-usage")


def files(root: Path = ROOT) -> list[Path]:
    return sorted((root / "csrc" / "cuda").rglob("*.cu"))


def nvcc() -> str | None:
    return shutil.which("nvcc")


def version() -> str | None:
    """The release of nvcc, or None where it is not installed."""
    compiler = nvcc()
    if compiler is None:
        return None
    said = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"release ([\d.]+)", said)
    return found[1] if found else said.strip()


def compile_all(root: Path = ROOT, cache_folder: Path = CACHE) -> list[dict[str, Any]]:
    """One row per kernel and architecture: file, kernel, arch and what it needs.

    Files whose code was compiled before are taken from the cache.
    """
    found: list[dict[str, Any]] = []
    for file in files(root):
        for arch in SHARED_LIMITS:
            place = cache_folder / "cuda" / f"{_key(file, arch, root)}.json"
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(json.dumps(compile_one(file, arch)))
            found += json.loads(place.read_text())
    return found


def _key(file: Path, arch: int, root: Path) -> str:
    """Of all that a result depends on; any header may be included."""
    headers = [path for path in sources.kernel_files(root) if path.suffix in (".cuh", ".h")]
    code = [sources.code(path) for path in (file, *headers)]
    readers = [Path(module).read_text(encoding="utf-8") for module in (__file__, sass.__file__)]
    parts = (file.name, str(arch), str(version()), *code, *readers)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def compile_one(file: Path, arch: int) -> list[dict[str, Any]]:
    """The kernels of one file on one architecture."""
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("nvcc is not on PATH: install the CUDA toolkit, or add it to PATH.")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [compiler, "-cubin", f"-arch=sm_{arch}", *_OPTIONS]
        command += ["-I", str(ROOT / "csrc"), "-o", str(cubin), str(file)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            return [_row(file, file.name, arch, problem=run.stderr.strip()[:500])]
        shared = _shared(run.stderr)
        machines = sass.dump(cubin, tool=shutil.which("cuobjdump"))
    return [
        _row(
            file,
            readable(name),
            arch,
            registers=machine.registers,
            spill_instructions=machine.spill_instructions,
            stack_bytes=machine.stack_bytes,
            shared_bytes=shared.get(name, 0),
            tensor_instructions=machine.tensor_instructions,
            async_copies=machine.async_copies,
        )
        for name, machine in sorted(machines.items())
    ]


def _row(file: Path, kernel: str, arch: int, **needs: Any) -> dict[str, Any]:
    nothing = {
        "registers": 0,
        "spill_instructions": 0,
        "stack_bytes": 0,
        "shared_bytes": 0,
        "theory_macs": 0,
        "tensor_macs": 0,
        "tensor_instructions": 0,
        "async_copies": 0,
        "tensor_instructions_in_loops": 0,
        "problem": None,
    }
    return {"file": file.name, "kernel": kernel, "arch": arch, **nothing, **needs}


def _shared(said: str) -> dict[str, int]:
    """Mangled name -> static shared memory, from what ptxas says of each kernel."""
    found: dict[str, int] = {}
    name = ""
    for line in said.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            name = match[1]
        if match := re.search(r"(\d+) bytes smem", line):
            found[name] = int(match[1])
    return found


def readable(mangled: str) -> str:
    """The kernel's C++ name with its template arguments."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return mangled
    said = subprocess.run(
        [tool, mangled], check=True, capture_output=True, text=True
    ).stdout.strip()
    said = re.sub(r"\(anonymous namespace\)::|<unnamed>::", "", said)
    return re.sub(r"^void ", "", said).split("(")[0]
