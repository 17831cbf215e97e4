"""Where a training step's time goes: by phase and kind of operation, against its floor.

    python -m benchmarks.breakdown --model bundled --steps 20 --batch 8
    python -m benchmarks.breakdown --model sd15 --size 256 --steps 5

The trainer's own step on a CPU, one thread. Every operation is timed where PyTorch dispatches it
(an operator of the library is one). Its floor is modelled: its FLOPs at the rate of a large product
measured in the same run, or its bytes at that of a large copy, whichever takes longer. What a
phase takes beyond its operations is Python, autograd and dispatch: phases are timed in a run of
their own, where nothing looks at operations. Seconds are those of the process, which other
processes on the machine stretch less than those of the clock.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rewardprop_fast as rpf
from benchmarks.memory_real import random_pipeline
from rewardprop_fast.memory.cost import CostCounter
from rewardprop_fast.memory.cpu import measure_cpu
from rewardprop_fast.models import load_bundled
from rewardprop_fast.rewards.brightness import BrightnessReward

#: What an operation's name tells of its kind; the first that fits.
KINDS = {
    "upsample": "convolution",
    "conv": "convolution",
    "lora": "LoRA linear",
    "attention": "attention",
    "group_norm": "GroupNorm, SiLU",
    "silu": "GroupNorm, SiLU",
    "layer_norm": "LayerNorm",
    "geglu": "GEGLU",
    "linear": "linear",
    "mm": "linear",
    "guided": "DDIM step",
    "copy": "copies",
    "clone": "copies",
    "cat": "copies",
}
OTHER, NONE = "other operations", "Python, autograd, dispatch"


class Spans(TorchDispatchMode):
    """Seconds and floors of operations by phase and kind."""

    def __init__(self, device: Any) -> None:
        super().__init__()
        self.device, self.counter, self.phase = device, CostCounter(), ""
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.floors: dict[tuple[str, str], float] = defaultdict(float)
        self.flops: dict[tuple[str, str], int] = defaultdict(int)
        self.phases: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        started = time.process_time()
        output = func(*args, **(kwargs or {}))
        seconds = time.process_time() - started
        cost = self.counter.see(func, args, kwargs or {}, output)
        key = (self.phase, kind_of(func))
        self.seconds[key] += seconds
        self.floors[key] += self.device.seconds(cost)
        self.flops[key] += cost.flops
        return output

    @contextmanager
    def watch(self, phase: str) -> Iterator[None]:
        """Surrounds a phase of the step."""
        before, self.phase, started = self.phase, phase, time.process_time()
        try:
            yield
        finally:
            self.phases[phase] += time.process_time() - started
            self.phase = before


def kind_of(func: Any) -> str:
    """The row an operation is counted under."""
    name = str(func).lower()
    return next((kind for part, kind in KINDS.items() if part in name), OTHER)


def main() -> int:
    """Time one step, print its table, add it to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("bundled", "sd15"), default="bundled")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side, of sd15")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON; the row is added to those it holds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    row = measure(args)
    print(table(row))
    if args.output is not None:
        rows = json.loads(args.output.read_text()) if args.output.is_file() else []
        args.output.write_text(json.dumps([*rows, row], indent=1) + "\n")
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The least seconds of each phase and kind over the repeats, and their floors."""
    device = measure_cpu()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(args, folder)
        prompts = ["a red apple"] * args.batch
        trainer.training_step(prompts, seed=0)  # weights are packed in the first
        found, plain = [], []
        for _ in range(args.repeats):
            plain.append(Spans(device))  # for its phases alone
            trainer.engine.watch = plain[-1].watch
            trainer.training_step(prompts, seed=0)
            spans = Spans(device)
            trainer.engine.watch = spans.watch
            with spans:
                trainer.training_step(prompts, seed=0)
            found.append(spans)
    rows = [
        {
            "phase": phase,
            "kind": kind,
            "seconds": min(spans.seconds[phase, kind] for spans in found),
            "floor": found[0].floors[phase, kind],
            "gflop": found[0].flops[phase, kind] / 1e9,
        }
        for phase, kind in found[0].seconds
        if phase
    ]
    for phase in found[0].phases:
        operations = sum(one["seconds"] for one in rows if one["phase"] == phase)
        rest = min(spans.phases[phase] for spans in plain) - operations
        rows.append({"phase": phase, "kind": NONE, "seconds": rest, "floor": 0.0, "gflop": 0.0})
    keys = ("model", "size", "steps", "k", "batch", "dtype")
    rates = {"gemm": device.peak(getattr(torch, args.dtype)), "bandwidth": device.bandwidth}
    return {key: getattr(args, key) for key in keys} | rates | {"rows": rows}


def table(row: dict[str, Any]) -> str:
    """Markdown: kinds down, phases across; seconds, and times the floor."""
    phases = list(dict.fromkeys(one["phase"] for one in row["rows"]))
    by_kind: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for one in row["rows"]:
        by_kind[one["kind"]][one["phase"]] = one
    totals = {
        kind: sum(one["seconds"] for one in parts.values()) for kind, parts in by_kind.items()
    }
    titles = [phase.replace("_", " ") for phase in phases]
    lines = [
        f"{row['model']}, T={row['steps']}, K={row['k']}, batch {row['batch']}, {row['dtype']}: "
        f"products {row['gemm'] / 1e9:.0f} GFLOP/s, copies {row['bandwidth'] / 1e9:.0f} GB/s",
        "",
        f"| s | {' | '.join(titles)} | all | floor | times the floor |",
        f"|---|{'---:|' * (len(phases) + 3)}",
    ]
    for kind in sorted(by_kind, key=lambda kind: -totals[kind]):
        parts = by_kind[kind]
        cells = [f"{parts[p]['seconds']:.3f}" if p in parts else "" for p in phases]
        floor = sum(one["floor"] for one in parts.values())
        ratio = f"{totals[kind] / floor:.2f}" if floor else ""
        lines.append(
            f"| {kind} | {' | '.join(cells)} | {totals[kind]:.3f} | "
            f"{f'{floor:.3f}' if floor else ''} | {ratio} |"
        )
    sums = [sum(p[phase]["seconds"] for p in by_kind.values() if phase in p) for phase in phases]
    floor = sum(one["floor"] for one in row["rows"])
    cells = [f"{value:.3f}" for value in sums]
    lines.append(
        f"| all | {' | '.join(cells)} | {sum(sums):.3f} | {floor:.3f} | {sum(sums) / floor:.2f} |"
    )
    return "\n".join(lines)


def _trainer(args: argparse.Namespace, folder: str) -> Any:
    bundled = args.model == "bundled"
    pipe = load_bundled() if bundled else random_pipeline(args.model, getattr(torch, args.dtype))
    size = None if bundled else args.size
    config = rpf.TrainConfig(
        method=rpf.DRaFT(args.k),
        sampling=rpf.SamplingConfig(steps=args.steps, guidance_scale=7.5, height=size, width=size),
        batch_size=args.batch,
        dtype=args.dtype,
        device="cpu",
        output=rpf.OutputConfig(directory=str(Path(folder, "run"))),
    )
    return rpf.RewardPropTrainer(pipe, BrightnessReward(), "bundled", config, progress="silent")


if __name__ == "__main__":
    sys.exit(main())
