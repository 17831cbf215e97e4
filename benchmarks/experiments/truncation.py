"""(a) K, the number of last steps with gradients: reward by images and by time, gradient norms.

The contribution of the step at depth k, counted from the image, is the gradient of DRaFT-k less
that of DRaFT-(k-1) for the same noise: `sum_k` of them is the gradient of DRaFT.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

import rewardprop_fast as rpf
from benchmarks.experiments import figures
from benchmarks.experiments.context import Context
from benchmarks.experiments.training import fingerprint, trainer_of
from rewardprop_fast import lora

VARIANTS = ("draft-1", "draft-2", "draft-5", "draft-T")


def run(context: Context) -> None:
    for seed in context.seeds:
        for variant in VARIANTS:
            context.do("runs", context.short(variant, seed))
    for seed in context.seeds:
        for weights in ("base", "draft-T"):
            by_depth(context, weights, seed)


def by_depth(context: Context, weights: str, seed: int) -> None:
    """Norms at the base model's weights, or at those that a short run ended with."""
    size = context.size
    base = weights == "base"
    trained = context.short("draft-T" if base else weights, seed)
    store = context.store("gradient_by_depth", "weights", "seed", "settings")
    key = {"weights": weights, "seed": seed, "settings": fingerprint((trained, size.batches))}
    if store.find(**key):
        return
    trainer = trainer_of(trained, size)
    if not base:
        lora.load_lora_state_dict(trainer.pipe.unet, context.adapter(trained))
    prompts = trainer.prompts.prompts
    whole: dict[int, list[float]] = {}
    part: dict[int, list[float]] = {}
    for batch in range(size.batches):
        chosen = [prompts[(batch * size.batch + i) % len(prompts)] for i in range(size.batch)]
        before = torch.zeros(())
        for k in range(1, size.steps + 1):
            trainer.engine.config = dataclasses.replace(trainer.config, method=rpf.DRaFT(k))
            trainer.optimizer.clear()
            trainer.training_step(chosen, seed=1000 * seed + batch)
            gradient = torch.cat([p.grad.flatten() for p in trainer.parameters.values()])
            whole.setdefault(k, []).append(float(gradient.norm()))
            part.setdefault(k, []).append(float((gradient - before).norm()))
            before = gradient.clone()
    store.add(
        {
            **key,
            "k": k,
            "norm": sum(whole[k]) / size.batches,
            "contribution": sum(part[k]) / size.batches,
        }
        for k in whole
    )
    ends = f"{part[1][0]:.2g} at 1, {part[size.steps][0]:.2g} at {size.steps}"
    print(f"gradient by depth: {weights}, seed {seed}: {ends}", flush=True)


def plot(context: Context, folder: Path) -> None:
    rows = context.store("runs").rows()
    if not rows:
        return
    plt = figures.pyplot()
    figures.by_images_and_time(rows, VARIANTS, folder / "truncation.svg", logarithmic=False)
    _plot_norms(context, rows, plt, folder)


def _plot_norms(context: Context, rows: Any, plt: Any, folder: Path) -> None:
    depth = context.store("gradient_by_depth").rows()
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.9), layout="constrained")
    names = {"base": "base model", "draft-T": "after DRaFT, all T"}
    for i, (weights, group) in enumerate(figures.by(depth, "weights").items()):
        for axis, y in ((axes[0], "norm"), (axes[1], "contribution")):
            figures.curve(axis, group, "k", y, names[weights], f"C{i}", at="k")
    axes[0].set_xlabel("K")
    axes[0].set_ylabel("gradient norm")
    axes[1].set_xlabel("depth k of the step, 1 is the last")
    axes[1].set_ylabel("norm of the step's contribution")
    groups = figures.by([row for row in rows if row.get("grad_norm")], "variant")
    for name in (v for v in VARIANTS if v in groups):
        label, colour = figures.TITLES[name], figures.COLOURS[name]
        figures.curve(axes[2], groups[name], "step", "grad_norm", label, colour)
    for axis in axes:
        axis.set_yscale("log")
    axes[0].legend(loc="lower right")
    axes[2].legend(loc="lower right")
    figures.save(figure, folder / "gradient_norms.svg")
