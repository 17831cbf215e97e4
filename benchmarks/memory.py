"""What a step of SDXL and of SD 1.5 holds: planned, unplanned, and with diffusers and peft alone.

    python -m benchmarks.memory

writes benchmarks/results/memory_plans.json, the table in docs/memory.md and two plots. Everything
is counted on tensors without memory; times are modelled for an RTX 3090. Nothing is run on a GPU.
It takes about six minutes on one core.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rewardprop_fast.memory.devices import find_device
from rewardprop_fast.memory.plan import Plan
from rewardprop_fast.memory.planner import Limits, Residency
from rewardprop_fast.memory.profile import Profile
from rewardprop_fast.memory.sizes import format_bytes
from rewardprop_fast.methods import DRaFT
from rewardprop_fast.models.shapes import load_shapes
from rewardprop_fast.rewards.shapes import tower
from rewardprop_fast.training.config import LoRAConfig, SamplingConfig, TrainConfig
from rewardprop_fast.training.dry_run import DryRun
from rewardprop_fast.training.estimate import estimate, make_profile, planner_for
from rewardprop_fast.training.forecast import composed_timeline, timeline
from rewardprop_fast.training.report import memory_plot

_HERE = Path(__file__).parent
RESULTS = _HERE / "results" / "memory_plans.json"
DOCS = _HERE.parent / "docs"
BEGIN, END = "<!-- memory table -->", "<!-- end of memory table -->"

CARD = "rtx3090"
GIB = 2**30
_STEPS = 50
_NAMES = {"sdxl": "SDXL", "sd15": "SD 1.5"}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        step: which step; title: how it is run.
        goal: GiB that were to be reached, None where nothing was.
        budget: GiB; None for no limit, "least" for the smallest that works.
    """

    step: str
    title: str
    goal: float | None = None
    budget: float | str | None = None
    residency: Residency = "all"
    offload: bool = False
    exact: bool = True
    plot: str = ""


@dataclass(frozen=True)
class Step:
    """A model at a size, with K of 50 steps."""

    model: str
    size: int
    k: int

    @property
    def title(self) -> str:
        return f"{_NAMES[self.model]} {self.size}², K = {self.k}"

    def dry_run(self, accelerated: bool = True, checkpointing: bool = False) -> DryRun:
        config = TrainConfig(
            method=DRaFT(self.k),
            sampling=SamplingConfig(steps=_STEPS, height=self.size, width=self.size),
            lora=LoRAConfig(rank=16),
            batch_size=1,
            dtype="bfloat16",
            accelerate=accelerated,
        )
        shapes = load_shapes(self.model, torch.bfloat16)
        if checkpointing:
            shapes.unet.enable_gradient_checkpointing()
            shapes.vae.enable_gradient_checkpointing()
        return DryRun.of_shapes(shapes, tower("clip-h", torch.bfloat16), config)


STEPS = {
    "sdxl-1": Step("sdxl", 1024, 1),
    "sdxl-5": Step("sdxl", 1024, 5),
    "sd15-50": Step("sd15", 512, 50),
}

PLANNED = (
    Row("sdxl-1", "nothing recomputed", 18.1),
    Row("sdxl-1", "planned", 9.7, 9.7),
    Row("sdxl-1", "planned, the least", None, "least"),
    Row("sdxl-1", "planned, weights by phase", 6.5, 6.5, "phases", plot="memory_sdxl_k1"),
    Row("sdxl-5", "planned", 21.5, 21.5, plot="memory_sdxl_k5"),
    Row("sdxl-5", "planned, no offload", 12.9, 12.9),
    Row("sdxl-5", "planned, offload", 9.5, 9.5, offload=True),
    Row("sd15-50", "planned, full DRaFT", 22.5, 22.5),
)

PLAIN = (
    Row("sdxl-1", "diffusers + peft"),
    Row("sdxl-1", "diffusers + peft, its checkpointing"),
    Row("sdxl-5", "diffusers + peft"),
    Row("sdxl-5", "diffusers + peft, its checkpointing"),
    Row("sd15-50", "diffusers + peft"),
    Row("sd15-50", "diffusers + peft, its checkpointing"),
)


def main() -> None:
    """Count everything, write everything."""
    rows = [plain(row) for row in PLAIN]
    for name, step in STEPS.items():
        dry = step.dry_run()
        profiled = make_profile(dry, find_device(CARD))
        rows += [planned(row, dry, profiled) for row in PLANNED if row.step == name]
    data = {
        "note": "Counted on fake tensors, seconds modelled; nothing was run on a GPU.",
        "card": CARD,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    write_table(rows)


def plain(row: Row) -> dict[str, Any]:
    """Diffusers' own modules, eager, with or without its checkpointing."""
    step = STEPS[row.step]
    dry = step.dry_run(accelerated=False, checkpointing="checkpointing" in row.title)
    found = estimate(dry, Plan(), find_device(CARD))
    return _facts(row, found.peak, found.by_phase, None, None, "exact")


def planned(row: Row, dry: DryRun, profiled: Profile) -> dict[str, Any]:
    """Under the fastest plan for the row's budget, or the least that works."""
    began = time.process_time()
    card = find_device(CARD)
    limits = Limits(
        None,
        to_host=card.download,
        to_device=card.upload,
        offload=row.offload,
        residencies=(row.residency,),
    )
    planner = planner_for(dry, profiled, limits)
    budget = None
    if row.budget is not None:
        budget = planner.least() if row.budget == "least" else int(float(row.budget) * GIB)
    plan = planner.plan(budget)
    planning = time.process_time() - began
    peak, by_phase, how = plan.peak, plan.by_phase, "composed"
    curve = composed_timeline(plan)
    if row.exact:
        found = estimate(dry, plan.plan, card)
        peak, by_phase, how, curve = found.peak, found.by_phase, "exact", timeline(found)
    if row.plot:
        picture = memory_plot.Curve(
            curve,
            budget,
            f"{STEPS[row.step].title} of {_STEPS}, batch 1, bfloat16, {row.title}",
            card.title,
            exact=row.exact,
        )
        memory_plot.draw(picture, DOCS / f"{row.plot}.svg")
    facts = _facts(row, peak, by_phase, plan.seconds, plan.unlimited_seconds, how)
    modes = {" / ".join(key): count for key, count in plan.modes.items()}
    return facts | {"modes": modes, "offloaded": plan.offloaded, "planning_cpu_seconds": planning}


def _facts(
    row: Row,
    peak: int,
    by_phase: dict[str, int],
    seconds: float | None,
    unlimited: float | None,
    how: str,
) -> dict[str, Any]:
    print(f"{STEPS[row.step].title}, {row.title}: {format_bytes(peak)} ({how})", flush=True)
    return {
        "step": STEPS[row.step].title,
        "how": row.title,
        "goal_gib": row.goal,
        "peak_bytes": peak,
        "peak_is": how,
        "peak_bytes_by_phase": by_phase,
        "modelled_seconds": seconds,
        "modelled_seconds_unlimited": unlimited,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| step | how | to be reached | allocated, GiB | peak in | modelled step, RTX 3090 |",
        "|---|---|---|---|---|---|",
    ]
    steps = list(dict.fromkeys(row["step"] for row in rows))
    for row in sorted(rows, key=lambda row: steps.index(row["step"])):
        phase = max(row["peak_bytes_by_phase"], key=row["peak_bytes_by_phase"].__getitem__)
        goal = "" if row["goal_gib"] is None else f"≤ {row['goal_gib']:g}"
        mark = "" if row["peak_is"] == "exact" else " (composed)"
        seconds = ""
        if row["modelled_seconds"] is not None:
            more = row["modelled_seconds"] / row["modelled_seconds_unlimited"] - 1
            seconds = f"{row['modelled_seconds']:.1f} s (+{more:.1%})"
        lines.append(
            f"| {row['step']} | {row['how']} | {goal} | {row['peak_bytes'] / GIB:.2f}{mark} "
            f"| {phase.replace('_', ' ')} | {seconds} |"
        )
    return "\n".join(lines)


def write_table(rows: Sequence[dict[str, Any]], path: Path = DOCS / "memory.md") -> None:
    """Put the table between its marks."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
