"""(g) A LoRA's strength, and two LoRAs of two rewards mixed, as `rewardprop mix` does it.

One is trained to a style, the other to pictures that JPEG compresses well. A mix at weights 1 - w
and w has the rank of both together; one of them is made as small as its parts again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.experiments import figures, long_runs
from benchmarks.experiments.context import Context
from benchmarks.experiments.judge import Verdict
from benchmarks.experiments.training import Run, Values, fingerprint
from rewardprop_fast import lora
from rewardprop_fast.lora.files import DOWN, UP, LayerLoRA
from rewardprop_fast.rewards import build, evaluate

STRENGTHS = (0.0, 0.5, 1.0, 2.0)
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SECOND = ("jpeg_compressibility", ())
ROWS = 4  # images in a column of the strips


def run(context: Context) -> None:
    for seed in context.seeds:
        one = context.brief("draft-1", seed)
        other = context.brief("draft-1", seed, reward=SECOND)
        context.do("brief", one)
        context.do("second_reward", other)
        measure(context, one, other)


def measure(context: Context, one: Run, other: Run) -> None:
    """Of the two adapters of a seed: every strength and every mix."""
    store = context.store("mixing", "seed", "settings")
    key = {"seed": one.seed, "settings": fingerprint((one.fingerprint, other.fingerprint))}
    if store.find(**key):
        return
    first, second = context.adapter(one), context.adapter(other)
    rows: list[Values] = []
    shown: dict[str, list[Tensor]] = {"strength": [], "interpolation": []}

    def note(kind: str, x: float, verdict: Verdict, **more: Any) -> None:
        rows.append({**key, "kind": kind, "x": x, **more, **gauges(verdict, context)})
        if kind in shown:
            shown[kind].append(verdict.images[:ROWS].half())

    look = context.judge.look
    alone = look(first)
    for strength in STRENGTHS:
        state = first if strength else None
        note("strength", strength, alone if strength == 1 else look(state, strength=strength))
    for weight in WEIGHTS:
        mixed = lora.mix([(layers(first), 1 - weight), (layers(second), weight)])
        note("interpolation", weight, look(state_of(mixed)) if weight else alone)
        if weight == 0.5:
            small, lost = lora.compress(mixed, one.rank)
            note("compressed", weight, look(state_of(small)), error=lost.error)
    note("sum", 1.0, look(state_of(lora.mix([(layers(first), 1.0), (layers(second), 1.0)]))))
    if one.seed == context.seeds[0]:
        strips = {name: torch.stack(columns).contiguous() for name, columns in shown.items()}
        context.work.mkdir(parents=True, exist_ok=True)
        save_file(strips, context.work / "mixing-strips.safetensors")
    store.add(rows)
    context.say(f"mixing: seed {one.seed}", rows)


def gauges(verdict: Verdict, context: Context) -> dict[str, float]:
    """The judge's, and the second reward."""
    reward = build(SECOND[0])
    prompts = context.judge.prompts
    second = evaluate(reward, verdict.images, prompts, [{} for _ in prompts]).mean()
    return {**verdict.gauges, "second": float(second)}


def layers(state: Mapping[str, Tensor]) -> dict[str, LayerLoRA]:
    """An adapter by layers; alpha is the rank, as in all runs here."""
    names = [name.removesuffix(DOWN) for name in state if name.endswith(DOWN)]
    return {
        name: LayerLoRA(state[name + DOWN], state[name + UP], float(state[name + DOWN].shape[0]))
        for name in names
    }


def state_of(mixed: Mapping[str, LayerLoRA]) -> dict[str, Tensor]:
    """The other way round."""
    assert all(layer.alpha == layer.rank for layer in mixed.values())
    tensors = {}
    for name, layer in mixed.items():
        tensors[name + DOWN], tensors[name + UP] = layer.down, layer.up
    return tensors


def plot(context: Context, folder: Path) -> None:
    rows = context.store("mixing").rows()
    if not rows:
        return
    plt = figures.pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.7), layout="constrained")
    kinds = figures.by(rows, "kind")
    for axis, kind, x in (
        (axes[0], "strength", "strength of the style's LoRA"),
        (axes[2], "interpolation", "weight of the second LoRA"),
    ):
        beside = axis.figure.axes[axis.figure.axes.index(axis) + 1]
        figures.curve(axis, kinds[kind], "x", "heldout", "", "C0", at="x")
        axis.set_xlabel(x)
        for gauge, colour in (("alignment", "C1"), ("recognised", "C2")):
            label = figures.LABELS[gauge]
            figures.curve(beside, kinds[kind], "x", gauge, label, colour, at="x")
        beside.set_xlabel(x)
        beside.set_ylabel("")
        beside.set_ylim(0, 1.02)
    right = axes[2].twinx()
    figures.curve(right, kinds["interpolation"], "x", "second", "", "C3", at="x")
    right.set_ylabel("JPEG compressibility", color="C3")
    axes[2].set_ylabel(figures.LABELS["heldout"], color="C0")
    axes[1].legend(loc="lower left")
    figures.save(figure, folder / "mixing.svg")
    path = context.work / "mixing-strips.safetensors"
    if path.is_file():
        for name, columns in load_file(path).items():
            long_runs.write_strip(list(columns.float()), folder / f"{name}.jpg")
    else:
        for name in ("strength", "interpolation"):
            long_runs.missing_strip(folder / f"{name}.jpg", "mixing")
