"""What this installation can do on this machine, which backend runs each operator, what is missing.

``report()`` gathers facts and never fails; ``render()`` turns them into text for a terminal.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch

from rewardprop_fast import ops, processor
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.ops import cuda_module, native
from rewardprop_fast.version import __version__

_REQUIRED = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")
_OPTIONAL = {
    "triton": "GPU kernels (pip install 'rewardprop-fast[gpu]')",
    "xformers": "another attention for GPUs (pip install 'rewardprop-fast[xformers]')",
    "tensorboard": "training curves in a browser (pip install 'rewardprop-fast[tensorboard]')",
}
_OPENMP_LIBRARY = re.compile(r"/(lib(?:gomp|iomp5|omp)[^/]*)$")


def report() -> dict[str, Any]:
    """Facts as plain dicts, lists, strings and numbers (JSON-ready). Sizes are in bytes.

    Keys: ``versions``, ``optional``, ``native``, ``openmp``, ``cpu``, ``memory``, ``cuda``,
    ``operators`` (which backend and why, by operator and kind of input) and ``advice`` (what is
    missing and what to do, empty where all is well).
    """
    facts: dict[str, Any] = {
        "versions": {
            "rewardprop_fast": __version__,
            "python": platform.python_version(),
            **{name: _installed(name) for name in _REQUIRED},
        },
        "optional": {name: _installed(name) for name in _OPTIONAL},
        "native": _native(),
        "openmp": {"threads": torch.get_num_threads(), "pools": _openmp_pools()},
        "cpu": _cpu(),
        "memory": _memory(),
        "cuda": _cuda(),
        "operators": _operators(),
    }
    facts["advice"] = _advice(facts)
    return facts


def render(facts: dict[str, Any] | None = None) -> str:
    """The report as lines of text; ``facts`` is what ``report()`` gave, made afresh if left out."""
    facts = report() if facts is None else facts
    built, cpu, cuda, memory = (facts[key] for key in ("native", "cpu", "cuda", "memory"))
    sections: dict[str, dict[str, str]] = {
        "versions": {name: found or "missing" for name, found in facts["versions"].items()},
        "optional": {
            name: found or f"not installed: {_OPTIONAL[name]}"
            for name, found in facts["optional"].items()
        },
        "native module": {"state": built["problem"] or f"built: {built['path']}"},
        "processor": {
            "name": cpu["name"],
            "cores": str(cpu["cores"]),
            "bfloat16": _BF16_MEANING[cpu["bf16"]],
            "float16": "never used on a CPU: far slower than float32",
            "threads": f"{facts['openmp']['threads']} (torch.set_num_threads)",
            "OpenMP pools": _pools_line(facts["openmp"]["pools"]),
            "memory": f"{_gib(memory['available'])} available of {_gib(memory['total'])}",
        },
        "CUDA": {
            "device": cuda["device"] or f"none ({cuda['why_none']})",
            "kernels in CUDA C++": cuda["module_problem"] or f"built: {cuda['module']}",
            "nvcc": f"{cuda['nvcc'] or 'not found'} (needed only to build these)",
        },
        "operators": dict(facts["operators"]),
    }
    isa = built["isa"]
    if isa is not None:
        sections["native module"]["instruction sets"] = (
            f"{isa['selected']} in use; supported here {', '.join(isa['supported'])}; "
            f"compiled in {', '.join(isa['compiled'])}"
        )
    elif built["isa_problem"]:
        sections["native module"]["instruction sets"] = built["isa_problem"]

    lines: list[str] = []
    for title, entries in sections.items():
        lines.append(title)
        width = max(map(len, entries))
        lines += [f"  {name:<{width}}  {text}" for name, text in entries.items()]
        lines.append("")
    lines.append("all is well" if not facts["advice"] else "what is missing")
    lines += [f"  - {text}" for text in facts["advice"]]
    return "\n".join(lines)


_BF16_MEANING = {
    "amx": "fast: AMX tiles",
    "avx512_bf16": "fast: AVX512-BF16",
    "arm": "fast: Arm's BF16",
    "none": "slow: no instruction for it here, float32 is the better choice",
}


def _installed(name: str) -> str | None:
    try:
        return package_version(name)
    except PackageNotFoundError:
        return None


def _native() -> dict[str, Any]:
    problem = native.why_missing()
    facts: dict[str, Any] = {"built": problem is None, "problem": problem}
    facts.update(path=None, isa=None, isa_problem=None)
    if problem is None:
        module = native.module()
        facts["path"] = module.__file__
        try:
            facts["isa"] = module.isa_report()
        except ValueError as error:  # REWARDPROP_ISA names one that this machine lacks
            facts["isa_problem"] = str(error)
    return facts


def _openmp_pools() -> list[str] | None:
    """The OpenMP runtimes in this process, each with threads of its own; None if unknown."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line)
    return sorted({os.path.realpath(path) for path in paths if _OPENMP_LIBRARY.search(path)})


def _cpu() -> dict[str, Any]:
    """Name, usable cores, and what bfloat16 rests on: a key of `_BF16_MEANING`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bf16 = processor.bfloat16() or "none"
    return {"name": processor.name() or platform.machine(), "cores": cores, "bf16": bf16}


def _memory() -> dict[str, int | None]:
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return {"total": None, "available": None}
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}
    return {
        key: kib[name] * 1024 if name in kib else None
        for key, name in (("total", "MemTotal"), ("available", "MemAvailable"))
    }


def _cuda() -> dict[str, Any]:
    available = torch.cuda.is_available()
    problem = cuda_module.why_missing()
    why_none = "no device or driver" if torch.version.cuda else "torch is built without CUDA"
    return {
        "device": torch.cuda.get_device_name(0) if available else None,
        "why_none": None if available else why_none,
        "built_for": torch.version.cuda,
        "nvcc": shutil.which("nvcc"),
        "module": None if problem else cuda_module.module().__file__,
        "module_problem": problem,
    }


def _operators() -> dict[str, str]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    lines = {}
    for operator in ops.OPERATORS.values():
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16):
                key = f"{operator.name}, {device}, {str(dtype).removeprefix('torch.')}"
                try:
                    lines[key] = ops.explain(operator, *operator.example(device, dtype))
                except ConfigError as error:
                    lines[key] = str(error)
    return lines


def _advice(facts: dict[str, Any]) -> list[str]:
    advice = [
        f"{name} is missing: pip install {name}"
        for name, found in facts["versions"].items()
        if found is None
    ]
    if not facts["native"]["built"]:
        advice.append(
            f"the native module is {facts['native']['problem']}. Everything works without it, on "
            "PyTorch's operators; to have it, put that right and install rewardprop-fast again."
        )
    if facts["cuda"]["device"] and facts["cuda"]["module_problem"]:
        advice.append(
            f"the module of CUDA C++ kernels is {facts['cuda']['module_problem']}. Everything "
            "works without it; to have it, put that right and install rewardprop-fast again."
        )
    if facts["native"]["isa_problem"]:
        advice.append(facts["native"]["isa_problem"])
    pools = facts["openmp"]["pools"]
    if pools is not None and len(pools) > 1:
        advice.append(
            f"{len(pools)} OpenMP runtimes are loaded, and their threads compete: "
            f"{', '.join(pools)}. Import torch before whatever brings the others."
        )
    return advice


def _pools_line(pools: list[str] | None) -> str:
    if pools is None:
        return "unknown on this system"
    return f"{len(pools)}: {', '.join(pools)}" if pools else "none loaded"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
