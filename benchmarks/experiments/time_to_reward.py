"""Time to a held-out reward: this library against TRL's AlignPropTrainer.

The same pipeline, reward, prompts in the same order, batch, T, guidance, rank, optimizer and dtype,
a thread each; learning rates by the same search. Both are judged by the same judge: its seconds do
not count. TRL runs in its own environment with its gradient checkpointing, once with its default,
a truncation drawn anew at every step of the chain, and once with the last step alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.experiments import figures
from benchmarks.experiments.context import Context
from benchmarks.experiments.judge import STYLE
from benchmarks.experiments.training import START, Run, Values, plan
from rewardprop_fast import randomness
from rewardprop_fast.randomness import Stream
from rewardprop_fast.training.prompts import load_prompts

OURS = ("draft-1", "draft-lv", "alignprop")
TRL = ("trl-last", "trl-random")
ROOT = Path(__file__).resolve().parents[2]


def run(context: Context) -> None:
    for seed in context.seeds:
        for variant in OURS:
            context.do("runs", context.short(variant, seed))
    by_trl = functools.partial(train, context)
    for variant in TRL:
        rate = context.rate(variant, by_trl)
        for seed in context.seeds:
            context.do("trl", plan(variant, rate, seed, context.size), by_trl)


def prompts_of(one: Run) -> list[str]:
    """The prompts this library's trainer draws, in their order."""
    prompts = load_prompts("bundled").prompts
    return [
        prompts[randomness.integer(one.seed, Stream.PROMPTS, step, 0, len(prompts) - 1, sample)]
        for step in range(one.updates)
        for sample in range(one.batch)
    ]


def train(context: Context, one: Run) -> list[Values]:
    """The rows of a run of TRL's."""
    from benchmarks.peers import assets
    from benchmarks.peers.environments import trl_python
    from benchmarks.peers.workloads import WORKLOADS

    cache = ROOT / "build" / "peers"
    tiny = one.model == "tiny"
    job = assets.make(WORKLOADS["tiny" if tiny else "bundled-k1"], cache)
    python = context.trl_python or trl_python(cache)
    with tempfile.TemporaryDirectory() as output:
        request = {
            **dataclasses.asdict(one),
            "folder": job["folder"],
            "output": output,
            "style": STYLE,
            "prompts": prompts_of(one),
        }
        done = subprocess.run(
            [python, "-m", "benchmarks.experiments.trl_child"],
            input=json.dumps(request),
            text=True,
            capture_output=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                 "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"TRL's run failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
        times = json.loads(Path(output, "times.json").read_text())
        rows = [{**one.columns, **START, **context.judge.look(None).gauges}]
        for point in times:
            state = load_file(Path(output, f"{point['step']}.safetensors"))
            samples = point["step"] * one.batch
            gauges = context.judge.look(state).gauges
            rows.append({**one.columns, **point, "samples": samples, **gauges})
    return rows


def seconds_to(
    rows: list[Mapping[str, str]], level: float, x: str = "cpu_seconds", y: str = "heldout"
) -> float | None:
    """Where the curve of one run first gets to a level, on straight lines between evaluations."""
    for before, after in itertools.pairwise(rows):
        low, high = float(before[y]), float(after[y])
        if high >= level:
            share = (level - low) / (high - low) if high > low else 1.0
            return float(before[x]) + max(0.0, share) * (float(after[x]) - float(before[x]))
    return None


def summary(context: Context, level: float) -> dict[str, list[float | None]]:
    """Seconds to a held-out reward by variant, one number a seed."""
    rows: list[Any] = [
        row
        for row in context.store("runs").rows() + context.store("trl").rows()
        if row["variant"] in (*OURS, *TRL)
    ]
    return {
        name: [seconds_to(one, level) for one in figures.by(group, "seed").values()]
        for name, group in figures.by(rows, "variant").items()
    }


#: The held-out reward that is waited for, from -2.6: where most runs come that keep the alignment.
LEVEL = -1.5


def plot(context: Context, folder: Path) -> None:
    theirs = context.store("trl").rows()
    if not theirs:
        return
    rows = [*context.store("runs").rows(), *theirs]
    plt = figures.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.1), layout="constrained")
    names = (*OURS, *TRL)
    figures.curves(axes[0], rows, names, "cpu_seconds", "heldout")
    figures.curves(axes[1], rows, names, "samples", "heldout")
    for axis in axes[:2]:
        axis.axhline(LEVEL, color="0.6", linewidth=0.8, linestyle=":")
    axes[0].legend(loc="lower right")
    found = summary(context, LEVEL)
    shown = [name for name in names if any(v is not None for v in found.get(name, []))]
    for i, name in enumerate(shown):
        numbers = [value for value in found[name] if value is not None]
        axes[2].barh(i, statistics.fmean(numbers), color=figures.COLOURS[name], alpha=0.6)
        axes[2].plot(numbers, [i] * len(numbers), "k.", markersize=4)
    axes[2].set_yticks(range(len(shown)), [figures.TITLES[name] for name in shown])
    axes[2].invert_yaxis()
    axes[2].set_xlabel(f"seconds of one core to {LEVEL:g}")
    figures.save(figure, folder / "time_to_reward.svg")
