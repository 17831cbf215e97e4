"""(f) Too far on purpose: a long run at the highest learning rate, its gauges and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments import figures
from benchmarks.experiments.context import Context
from benchmarks.experiments.training import keep, plan, progress
from rewardprop_fast.errors import NonFiniteError

SHOWN = 4  # images in a column of the strip


def run(context: Context) -> None:
    size = context.size
    rate = max(size.rates)
    store = context.store("overoptimisation", "seed", "settings")
    for seed in context.seeds:
        one = plan("draft-1", rate, seed, size, updates=size.long, every=max(1, size.long // 10))
        key = {"seed": seed, "settings": one.fingerprint}
        if store.find(**key):
            continue
        rows, columns = [], []
        try:
            for point in progress(one, size, context.judge):
                rows.append(point.row)
                columns.append(torch.cat(list(point.images[:SHOWN]), dim=1))
        except NonFiniteError:
            pass
        if seed == context.seeds[0]:
            keep(context.work, "overoptimisation-strip", {"strip": torch.cat(columns[::2], dim=2)})
        store.add(rows)
        context.say(f"overoptimisation: seed {seed}", rows)


def strip(context: Context) -> Tensor | None:
    """Images of the first seed over its evaluations, (3, H, W); None where it was not run here."""
    from safetensors.torch import load_file

    path = context.work / "overoptimisation-strip.safetensors"
    return load_file(path)["strip"] if path.is_file() else None


def plot(context: Context, folder: Path) -> None:
    rows: Any = context.store("overoptimisation").rows()
    if not rows:
        return
    plt = figures.pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), layout="constrained")
    gauges = ("heldout", "alignment", "diversity", "drift")
    for i, (axis, gauge) in enumerate(zip(axes, gauges, strict=True)):
        figures.curve(axis, rows, "step", gauge, figures.LABELS[gauge], f"C{i}")
    figures.curve(axes[0], rows, "step", "reward", "reward trained on", "0.5", style="--")
    axes[0].set_ylabel("log P(style | image)")
    axes[0].legend(loc="lower right")
    figures.save(figure, folder / "overoptimisation.svg")
    picture = strip(context)
    if picture is not None:
        from PIL import Image

        pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "overoptimisation.jpg", quality=85)
