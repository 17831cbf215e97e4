"""Whole networks, accelerated against eager: `python -m benchmarks.modules`.

SD 1.5's UNet at 256² (with a rank-4 LoRA on the attention projections, batch 2 as guidance makes
it) and the VAE's decoder at 256², random weights, channels last: seconds of a forward and backward
pass on one thread, and the bytes kept for backward. Bytes are also given for SDXL at 1024², on fake
tensors, which hold no memory: they count the same storages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses import FakeTensorMode

import rewardprop_fast as rpf
from benchmarks.timing import interleaved, speedup
from rewardprop_fast import lora
from rewardprop_fast.memory import MemoryTracker, make_fake
from rewardprop_fast.models import architectures
from rewardprop_fast.training import report
from rewardprop_fast.training.precision import resolve_device

Pass = Callable[[], Tensor]


@dataclass(frozen=True)
class Workload:
    """A network on the default device, what is attached to it, and its forward pass."""

    network: Callable[[torch.dtype], Any]
    attach: Callable[[Any], object]
    forward: Callable[[Any, torch.dtype], Pass]


def unet(name: str, size: int) -> Workload:
    """A UNet with a LoRA, latents of size x size, batch 2 as guidance makes it."""

    def attach(network: Any) -> None:
        lora.inject(network, rank=4, target_modules="attention")

    def forward(network: Any, dtype: torch.dtype) -> Pass:
        inputs = architectures.unet_inputs(network, 2, size, dtype)
        return lambda: network(**inputs).sample

    return Workload(partial(architectures.unet, name), attach, forward)


def decoder(size: int) -> Workload:
    """The VAE's decoder, latents of size x size that carry gradients, batch 1."""

    def attach(network: Any) -> None:
        del network.encoder, network.quant_conv

    def forward(network: Any, dtype: torch.dtype) -> Pass:
        latents = torch.randn(1, 4, size, size, dtype=dtype).requires_grad_()
        return lambda: network.decode(latents).sample

    return Workload(architectures.autoencoder, attach, forward)


TIMED = {"SD 1.5 UNet, 256²": unet("sd15", 32), "VAE decoder, 256²": decoder(32)}
#: Of these bytes alone: they are too large to run here.
COUNTED = {**TIMED, "SDXL UNet, 1024²": unet("sdxl", 128), "VAE decoder, 1024²": decoder(128)}


def kept_bytes(workload: Workload, fast: bool, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes alive after the forward pass that were not there before it, its output left out.

    Counted on fake tensors.
    """
    with torch.device("meta"):
        model = workload.network(dtype)
    workload.attach(model)
    if fast:
        rpf.accelerate(model)
    mode = FakeTensorMode()
    make_fake(model, mode)
    with mode:
        forward = workload.forward(model, dtype)
        with MemoryTracker() as tracker:
            output = forward()
            made = sum(h.nbytes for h in tracker.alive() if h.operator != "given")
        return made - output.untyped_storage().nbytes()


def measure_bytes(workload: Workload) -> dict[str, Any]:
    found = {name: kept_bytes(workload, name == "accelerated") for name in VARIANTS}
    return {**found, "ratio": found["accelerated"] / found["eager"]}


VARIANTS = ("eager", "accelerated")


def measure_time(workload: Workload, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    def variant(fast: bool) -> Callable[[], None]:
        torch.manual_seed(0)
        model = workload.network(dtype)
        workload.attach(model)
        if fast:
            rpf.accelerate(model)
        forward = workload.forward(model, dtype)
        return lambda: forward().float().square().mean().backward()

    timings = interleaved(
        {name: variant(name == "accelerated") for name in VARIANTS}, rounds=rounds
    )
    return {
        **{name: timing.summary() for name, timing in timings.items()},
        "speedup": speedup(timings["eager"], timings["accelerated"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/modules_cpu.json"))
    arguments = parser.parse_args()
    console = Console()
    found: dict[str, Any] = {
        "device": report.device_name(resolve_device("cpu")),
        "threads": 1,
        "versions": report.versions(),
        "kept_bytes": {},
        "milliseconds": {},
    }
    with console.status("counting bytes"):
        for name, workload in COUNTED.items():
            found["kept_bytes"][name] = measure_bytes(workload)
    for name, workload in TIMED.items():
        for dtype in arguments.dtypes:
            with console.status(f"timing {name}, {dtype}"):
                row = measure_time(workload, getattr(torch, dtype), arguments.rounds)
            found["milliseconds"][f"{name}, {dtype}"] = row
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    show(found, console)
    console.print(f"written to {arguments.output}")


def show(found: dict[str, Any], console: Console) -> None:
    table = Table(title="kept for backward, GiB, bfloat16")
    for column in ("network", "eager", "accelerated", "ratio"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, row in found["kept_bytes"].items():
        gib = [f"{row[variant] / 2**30:.3f}" for variant in ("eager", "accelerated")]
        table.add_row(name, *gib, f"{row['ratio']:.3f}")
    console.print(table)
    table = Table(title=f"forward + backward, ms, one thread, {found['device']}")
    for column in ("network", "eager min", "p50", "accelerated min", "p50", "speed-up"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, row in found["milliseconds"].items():
        cells = [
            f"{row[variant][key]:.0f}"
            for variant in ("eager", "accelerated")
            for key in ("min_ms", "p50_ms")
        ]
        table.add_row(name, *cells, f"{row['speedup']:.2f}x")
    console.print(table)


if __name__ == "__main__":
    main()
