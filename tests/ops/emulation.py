"""The CUDA C++ kernels on this machine's CPU: built by g++ on csrc/emulation, loaded as a module.

It has the functions of rewardprop_fast._cuda, takes addresses of host memory, and runs the kernels
of csrc/cuda as they are. With the environment variable REWARDPROP_EMULATION=address or =thread it
is built with AddressSanitizer and UndefinedBehaviorSanitizer, or with threads of the system under
ThreadSanitizer; the process then needs `preload` in its environment.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pybind11

from rewardprop_fast.version import __version__

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulation"
COMPILER = os.environ.get("CXX") or "g++"

#: What the compiler adds to the kernels, by sanitizer.
SANITIZERS = {
    "": ["-O1"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread", "-DREWARDPROP_EMULATION_THREADS"],
}
_RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}

COMMON = ["-std=c++17", "-g", "-fPIC", "-Wall", "-Wextra", "-ffp-contract=off", "-pthread"]


def why_not(sanitizer: str = "") -> str | None:
    """None where kernels can be emulated here, otherwise what is missing."""
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler ({COMPILER})"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers are missing"
    if sanitizer and not Path(_runtime(sanitizer)).is_absolute():
        return f"{COMPILER} has no {_RUNTIME[sanitizer]}"
    return None


def preload(sanitizer: str) -> dict[str, str]:
    """The environment of a Python process that loads the module with this sanitizer."""
    # Python itself keeps memory until the end; what the kernels take is Python's.
    options = {"address": ("ASAN_OPTIONS", "detect_leaks=0"), "thread": ("TSAN_OPTIONS", "")}
    name, value = options[sanitizer]
    return {"LD_PRELOAD": _runtime(sanitizer), "REWARDPROP_EMULATION": sanitizer, name: value}


@cache
def module() -> Any:
    """The module, built where its sources are newer; as REWARDPROP_EMULATION says."""
    path = build(os.environ.get("REWARDPROP_EMULATION", ""))
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def build(sanitizer: str) -> Path:
    """The module's file."""
    flags = [*COMMON, *SANITIZERS[sanitizer]]
    folder = BUILD / (sanitizer or "plain")
    digest = _digest([COMPILER, *flags, sys.version, __version__])
    target = folder / f"_cuda_emulated_{digest}.so"
    if target.exists():
        return target
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    binding_flags = [
        *COMMON,
        "-O0",
        "-DREWARDPROP_MODULE=_cuda_emulated",
        f'-DREWARDPROP_VERSION="{__version__}"',
        f"-I{sysconfig.get_paths()['include']}",
        f"-I{pybind11.get_include()}",
    ]
    jobs = [(flags, source) for source in sorted(CSRC.glob("cuda/*.cu"))]
    jobs += [(binding_flags, source) for source in sorted(CSRC.glob("cuda/bindings/*.cpp"))]
    objects = [str(folder / f"{source.parent.name}_{source.stem}.o") for _, source in jobs]

    def compile_one(index: int) -> None:
        arguments, source = jobs[index]
        run(COMPILER, *arguments, "-x", "c++", "-c", str(source), "-o", objects[index])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, range(len(jobs))))
    unfinished = target.with_suffix(f".{os.getpid()}")
    run(COMPILER, *flags, "-shared", *objects, "-o", str(unfinished))
    unfinished.rename(target)
    return target


def run(*command: str) -> None:
    """Run a command of the build; its words are in the error."""
    # A sanitizer that is preloaded into Python is not for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


def _digest(words: list[str]) -> str:
    digest = hashlib.sha256("\n".join(words).encode())
    for source in sorted(CSRC.rglob("*")):
        if source.is_file() and source.relative_to(CSRC).parts[0] != "cpu":
            digest.update(str(source.relative_to(CSRC)).encode() + source.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _runtime(sanitizer: str) -> str:
    """The sanitizer's library: a path, or its bare name where the compiler has none."""
    result = subprocess.run(
        [COMPILER, f"-print-file-name={_RUNTIME[sanitizer]}"],
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()
