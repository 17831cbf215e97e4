"""(b) What DRaFT-LV's endpoints are worth in reward: n of them, by images and by time.

All run at the learning rate that the search chose for DRaFT-LV, one seed after the other, so that
a change of the machine's speed meets every n alike.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.experiments import figures
from benchmarks.experiments.context import Context
from benchmarks.experiments.training import plan

TABLE = "endpoints"
#: DRaFT-1 has none.
VARIANTS = ("draft-1", "draft-lv-1", "draft-lv-2", "draft-lv-4", "draft-lv-8")


def run(context: Context) -> None:
    rate = context.rate("draft-lv")
    for seed in context.seeds:
        for variant in VARIANTS:
            context.do(TABLE, plan(variant, rate, seed, context.size))


def plot(context: Context, folder: Path) -> None:
    figures.by_images_and_time(
        context.store(TABLE).rows(), VARIANTS, folder / "endpoints.svg", logarithmic=False
    )
