"""A competitor in its own process: `python -m benchmarks.peers.child NAME`, then JSON lines.

Runs in TRL's environment too: of this library nothing is imported here but the tracker of bytes.
"""

from __future__ import annotations

import gc
import os
import platform
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import serve

#: Name -> module, and the variant it is asked for.
COMPETITORS: dict[str, tuple[str, str]] = {
    "trl": ("trl", ""),
    "compat": ("compat", ""),
    "loop": ("loop", ""),
    "loop-checkpoint": ("loop", "checkpoint"),
    "loop-compile": ("loop", "compile"),
    "loop-graphs": ("loop", "graphs"),
    "loop-xformers": ("loop", "xformers"),
    "ours": ("ours", ""),
    "ours-lean": ("ours", "lean"),
}


class Child:
    """Answers the race's commands with one competitor."""

    def __init__(self, name: str) -> None:
        module, variant = COMPETITORS[name]
        self.make = import_module(f"benchmarks.peers.competitors.{module}").make
        self.variant = variant
        self.competitor: Any = None
        self.device = "cpu"

    def prepare(self, job: dict[str, Any]) -> dict[str, Any]:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.device = job["device"]
        started = time.perf_counter()
        self.competitor = self.make(job, self.variant)
        return {
            "seconds": time.perf_counter() - started,
            "versions": _versions(),
            "process_peak": _status("VmHWM"),
        }

    def gradients(self, path: str, random_seed: int | None = None, draw: int = 0) -> dict[str, Any]:
        """Loss and rewards; the gradients go to a file. No update.

        Other draws of the noise are the same pixels, moved.
        """
        from safetensors.torch import save_file

        latents = self.competitor.latents
        self.competitor.latents = latents.roll(draw, -1)
        try:
            gradients, rewards = self.competitor.gradients(random_seed)
        finally:
            self.competitor.latents = latents
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in gradients.items()}, path)
        return {"rewards": [float(r) for r in rewards]}

    def step(self) -> dict[str, Any]:
        """One whole update: seconds, by phase where they are known."""
        self._wait()
        started = time.perf_counter()
        phases = self.competitor.step()
        self._wait()
        return {"seconds": time.perf_counter() - started, "phases": phases or {}}

    def peak(self) -> dict[str, Any]:
        """A step with the records of the highest use reset before it."""
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            idle = torch.cuda.memory_reserved()
            self.step()
            return {
                "idle": idle,
                "step_peak": torch.cuda.max_memory_allocated(),
                "reserved_peak": torch.cuda.max_memory_reserved(),
                "process_peak": _status("VmHWM"),
            }
        whole = _status("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")
        self.step()
        peak = _status("VmHWM")
        gc.collect()
        return {"idle": _status("VmRSS"), "step_peak": peak, "process_peak": max(whole, peak)}

    def tracked(self) -> dict[str, Any]:
        """The most bytes of live tensors within a step, weights included."""
        from rewardprop_fast.memory.measure import MemoryTracker

        tracker = MemoryTracker()
        tracker.count(self.competitor.held())
        with tracker:
            self.competitor.step()
        return {"tracked_peak": tracker.peak_bytes}

    def gemm(self, dtypes: list[str], size: int = 2048) -> dict[str, Any]:
        """The best rate of a large product, FLOP/s by dtype."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        size = 8192 if device == "cuda" else size
        rates = {}
        for dtype in dtypes:
            of = {"device": device, "dtype": getattr(torch, dtype)}
            a, b = (torch.randn(size, size).to(**of) for _ in range(2))
            best = float("inf")
            for _ in range(6):
                started = time.perf_counter()
                torch.mm(a, b)
                if device == "cuda":
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - started)
            rates[dtype] = 2 * size**3 / best
        return {"rates": rates}

    def _wait(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "peft", "accelerate", "trl", "xformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


if __name__ == "__main__":
    child = Child(sys.argv[1])
    names = ("prepare", "gradients", "step", "peak", "tracked", "gemm")
    serve({name: getattr(child, name) for name in names})
