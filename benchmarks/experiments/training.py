"""One training run: updates by the trainer, looks by the judge in between."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

import rewardprop_fast as rpf
from benchmarks.experiments.judge import STYLE, Judge, load_pipe
from benchmarks.experiments.size import Size
from benchmarks.experiments.variants import method
from rewardprop_fast import lora
from rewardprop_fast.errors import NonFiniteError
from rewardprop_fast.rewards import build

Values = dict[str, Any]
#: A run that has not begun.
START = {"step": 0, "samples": 0, "seconds": 0.0, "cpu_seconds": 0.0}
#: Batches of an update of DDPO; methods with gradients take one.
DDPO_BATCHES = 4


@dataclass(frozen=True)
class Run:
    """What one run is, whole: its fingerprint tells it from runs of other settings.

    Attributes:
        variant: name of its method, see `variants`.
        reward: name and arguments.
        updates, every: updates, and how many lie between two evaluations.
    """

    variant: str
    learning_rate: float
    seed: int
    updates: int
    every: int
    rank: int
    model: str
    steps: int
    batch: int
    dtype: str
    guidance: float
    accumulation: int = 1
    eta: float = 0.0
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    reward: tuple[str, tuple[tuple[str, Any], ...]] = ("style", (("style", STYLE),))

    @property
    def fingerprint(self) -> str:
        """Of everything but seed and variant, which stand beside it."""
        return fingerprint({**asdict(self), "seed": None, "variant": None})

    @property
    def columns(self) -> Values:
        """What every row of the run says of it."""
        return {
            "variant": self.variant, "seed": self.seed, "settings": self.fingerprint,
            "learning_rate": self.learning_rate, "rank": self.rank,
        }  # fmt: skip

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}-{self.fingerprint}"


def fingerprint(settings: Any) -> str:
    """Eight characters that differ where settings do."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]


def plan(variant: str, rate: float, seed: int, size: Size, **changes: Any) -> Run:
    """A short run of a variant; DDPO gets what it needs: noise, and more images an update."""
    run = Run(
        variant, rate, seed, size.updates, size.every, size.rank, size.model, size.steps,
        size.batch, size.dtype, size.guidance,
    )  # fmt: skip
    if variant == "ddpo":
        every = max(1, size.ddpo // 3)
        run = replace(run, eta=1.0, accumulation=DDPO_BATCHES, updates=size.ddpo, every=every)
    return replace(run, **changes)


def trainer_of(run: Run, size: Size) -> rpf.RewardPropTrainer:
    """The run's trainer, at its first step. It writes no files."""
    config = rpf.TrainConfig(
        method=method(run.variant, size),
        sampling=rpf.SamplingConfig(steps=run.steps, guidance_scale=run.guidance, eta=run.eta),
        lora=rpf.LoRAConfig(rank=run.rank),
        optimizer=rpf.OptimizerConfig(
            learning_rate=run.learning_rate,
            weight_decay=run.weight_decay,
            max_grad_norm=run.max_grad_norm,
        ),
        output=rpf.OutputConfig(drift_every=run.every),
        steps=run.updates,
        batch_size=run.batch,
        accumulation_steps=run.accumulation,
        seed=run.seed,
        dtype=run.dtype,
        device="cpu",
    )
    name, arguments = run.reward
    reward = build(name, **dict(arguments))
    return rpf.RewardPropTrainer(load_pipe(size), reward, "bundled", config, progress="silent")


@dataclass
class Progress:
    """A run at an evaluation: its row, and the adapter (None before the first update)."""

    row: Values
    state: dict[str, Tensor] | None
    images: Tensor


def progress(run: Run, size: Size, judge: Judge) -> Iterator[Progress]:
    """Train; yields at step 0 and at every evaluation.

    `seconds` is wall-clock and `cpu_seconds` the processor's time, which another process on the
    machine does not lengthen; both of the updates alone, with all the trainer reports of them, the
    first one's preparations among it, without loading and evaluations.
    """
    trainer = trainer_of(run, size)
    verdict = judge.look(None)
    yield Progress({**run.columns, **START, **verdict.gauges}, None, verdict.images)
    seconds = cpu = 0.0
    norms: list[float] = []
    for step in range(1, run.updates + 1):
        wall_then, cpu_then = time.perf_counter(), time.process_time()
        row = trainer.update()
        seconds += time.perf_counter() - wall_then
        cpu += time.process_time() - cpu_then
        norms.append(row["grad_norm"])
        if step % run.every and step != run.updates:
            continue
        state = {k: v.clone() for k, v in lora.lora_state_dict(trainer.pipe.unet).items()}
        verdict = judge.look(state)
        yield Progress(
            {
                **run.columns,
                "step": step,
                "samples": step * run.batch * run.accumulation,
                "seconds": seconds,
                "cpu_seconds": cpu,
                **verdict.gauges,
                "drift": row["drift"],
                "grad_norm": sum(norms) / len(norms),
                "grad_norm_max": max(norms),
            },
            state,
            verdict.images,
        )
        norms = []


def train(run: Run, size: Size, judge: Judge, work: Path, name: str | None = None) -> list[Values]:
    """The rows of a whole run; its adapter is kept in `work`. A run that breaks ends there.

    Args:
        name: what the adapter is kept as; None is the run's own.
    """
    rows: list[Values] = []
    state = None
    try:
        for point in progress(run, size, judge):
            rows.append(point.row)
            state = point.state or state
    except NonFiniteError:
        rows.append({**rows[-1], "step": rows[-1]["step"] + 1, "reward": float("nan")})
    if state is not None:
        keep(work, name or run.name, state)
    return rows


def keep(work: Path, name: str, state: dict[str, Tensor]) -> None:
    """Write an adapter for later experiments."""
    work.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, work / f"{name}.safetensors")


def adapter(run: Run, size: Size, judge: Judge, work: Path) -> dict[str, Tensor]:
    """The adapter of a run, trained now if it is not there."""
    path = work / f"{run.name}.safetensors"
    if not path.is_file():
        train(replace(run, every=run.updates), size, judge, work, run.name)
    return load_file(path)
