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
from collections.abc import Callable, Iterable
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
    if sanitizer and not Path(_library(_RUNTIME[sanitizer])).is_absolute():
        return f"{COMPILER} has no {_RUNTIME[sanitizer]}"
    return None


def preload(sanitizer: str) -> dict[str, str]:
    """The environment of a Python process that loads the module with this sanitizer."""
    # Python itself keeps memory until the end; what the kernels take is Python's.
    options = {"address": ("ASAN_OPTIONS", "detect_leaks=0"), "thread": ("TSAN_OPTIONS", "")}
    name, value = options[sanitizer]
    # libstdc++ beside it: otherwise the sanitizer does not find what throws exceptions.
    libraries = f"{_library(_RUNTIME[sanitizer])} {_library('libstdc++.so')}"
    return {"LD_PRELOAD": libraries, "REWARDPROP_EMULATION": sanitizer, name: value}


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
    target = _folder(sanitizer or "plain", flags) / "_cuda_emulated.so"
    if not target.exists():
        objects = _objects("bindings", _binding_flags(), CSRC.glob("cuda/bindings/*.cpp"))
        objects += _objects(sanitizer or "plain", flags, CSRC.glob("cuda/*.cu"))
        _finished(target, lambda path: run(COMPILER, *flags, "-shared", *objects, "-o", path))
    return target


def _binding_flags() -> list[str]:
    """Calls and checks of arguments are the same for all sanitizers, which ask for the kernels."""
    return [
        *COMMON,
        "-O0",
        "-DREWARDPROP_MODULE=_cuda_emulated",
        f'-DREWARDPROP_VERSION="{__version__}"',
        '-DREWARDPROP_SOURCES="emulated"',
        f"-I{sysconfig.get_paths()['include']}",
        f"-I{pybind11.get_include()}",
    ]


def _objects(kind: str, flags: list[str], sources: Iterable[Path]) -> list[str]:
    """The sources, compiled: as many at a time as there are processors."""
    folder = _folder(kind, flags)

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        command = [COMPILER, *flags, "-x", "c++", "-c", str(source), "-o"]
        if not target.exists():
            _finished(target, lambda path: run(*command, path))
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, sorted(sources)))


def _folder(kind: str, flags: list[str]) -> Path:
    """For what these flags make of the present sources; what was made of others is removed."""
    folder = BUILD / kind / _digest([COMPILER, *flags, sys.version])
    if not folder.exists():
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
    return folder


def _finished(target: Path, make: Callable[[str], None]) -> None:
    """The file appears under its name when it is complete: two processes may be building."""
    unfinished = target.with_name(f"{os.getpid()}_{target.name}")
    make(str(unfinished))
    unfinished.rename(target)


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
def _library(name: str) -> str:
    """A library of the compiler: its path, or the bare name where the compiler has none."""
    result = subprocess.run(
        [COMPILER, f"-print-file-name={name}"],
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()
