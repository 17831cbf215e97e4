"""Long runs at the highest learning rate: much further than anyone should go.

Shared by (c), which compares methods, and (f), which asks what warns. All have the same rate, so
that nothing but the method differs; the images of every evaluation are kept for the strips.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.experiments.context import Context
from benchmarks.experiments.training import Run, Values, plan, progress
from rewardprop_fast.errors import NonFiniteError

TABLE = "long"
SHOWN = 6  # images kept of an evaluation


def long_run(context: Context, variant: str, seed: int) -> Run:
    size = context.size
    every = max(1, size.long // 5)
    return plan(variant, max(size.rates), seed, size, updates=size.long, every=every)


def do(context: Context, variant: str, seed: int) -> None:
    """Train, if it is still to be done."""
    context.do(TABLE, long_run(context, variant, seed), lambda run: _train(context, run))


def _train(context: Context, run: Run) -> list[Values]:
    """The rows; a run that breaks ends there."""
    rows: list[Values] = []
    images: dict[str, Tensor] = {}
    try:
        for point in progress(run, context.size, context.judge):
            rows.append(point.row)
            images[str(point.row["step"])] = point.images[:SHOWN].half().contiguous()
    except NonFiniteError:
        print(f"{run.variant}, seed {run.seed}: broke after update {rows[-1]['step']}", flush=True)
    context.work.mkdir(parents=True, exist_ok=True)
    save_file(images, _path(context, run))
    return rows


def images(context: Context, variant: str, seed: int) -> dict[int, Tensor] | None:
    """(SHOWN, 3, H, W) by update; None where the run was not done here."""
    path = _path(context, long_run(context, variant, seed))
    if not path.is_file():
        return None
    return {int(step): value.float() for step, value in sorted(load_file(path).items(), key=_step)}


def _path(context: Context, run: Run) -> Path:
    return context.work / f"long-{run.name}-images.safetensors"


def _step(item: tuple[str, Tensor]) -> int:
    return int(item[0])


def missing_strip(path: Path, experiment: str) -> None:
    """Say that a strip was not drawn, and what draws it."""
    print(f"{path.name}: not drawn, its images are not here; `{experiment}` trains the runs anew")


def write_strip(columns: list[Tensor], path: Path) -> None:
    """Columns of images, (N, 3, H, W) each, as a small JPEG."""
    from PIL import Image

    whole = torch.cat([torch.cat(list(column), dim=1) for column in columns], dim=2)
    pixels: Any = (whole.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=80)
