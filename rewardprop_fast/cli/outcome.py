"""What a run prints around its progress: what will be done, and what was reached and where."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewardprop_fast.training import report, run_files
from rewardprop_fast.training.report.formats import change, duration, number, size

if TYPE_CHECKING:
    from rewardprop_fast.training.config import RewardConfig, RunConfig
    from rewardprop_fast.training.trainer import RewardPropTrainer, TrainResult

_BUNDLED = "bundled, a small emoji model that ships with the package"


def print_header(console: Console, config: RunConfig, trainer: RewardPropTrainer) -> None:
    """Model, reward, method and machine, before anything is computed."""
    train = config.train
    unet = trainer.pipe.unet
    trained = sum(p.numel() for p in trainer.parameters.values())
    frozen = sum(p.numel() for p in unet.parameters()) - trained
    height, width = trainer.engine.height, trainer.engine.width
    method = train.to_dict()["method"]
    name = method.pop("name")
    settings = ", ".join(
        f"{key} {'all' if value is None else value}" for key, value in method.items()
    )
    facts = {
        "model": f"{_BUNDLED if config.model.path == 'bundled' else config.model.path}: "
        f"{width} x {height} pixels, UNet of {_count(frozen)} parameters, frozen",
        "trained": f"LoRA of rank {train.lora.rank}: {_count(trained)} parameters",
        "reward": _rewards(config.reward),
        "held-out": _rewards(config.heldout_reward) or "none: cheating would not show",
        "method": f"{name} ({settings}), {train.steps} steps of "
        f"{train.batch_size * train.accumulation_steps} images, "
        f"{train.sampling.steps} sampling steps, guidance {train.sampling.guidance_scale:g}",
        "prompts": f"{len(trainer.prompts)}, such as {trainer.prompts.prompts[0]!r}",
        "machine": _machine(trainer),
        "folder": str(train.output.directory),
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, text in facts.items():
        table.add_row(key, Text(text))
    console.print(table)
    console.print()


def print_outcome(console: Console, config: RunConfig, result: TrainResult) -> None:
    """What a run reached, or how to go on with one that was stopped."""
    folder = result.directory
    if not result.summary:
        console.print("\nGo on with")
        _command(console, f"rewardprop train {_quoted(folder / run_files.CONFIG)} --resume")
        return
    summary = result.summary
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right")
    for title, key in (("reward", "reward"), ("held-out reward", "heldout")):
        before, after = summary[f"{key}_before"], summary[f"{key}_after"]
        if before is not None and after is not None:
            ink = "green" if after > before else "red"
            table.add_row(
                title, number(before), number(after), f"[{ink}]{change(before, after)}[/]"
            )
    console.print(table)
    steps = "1 step" if summary["steps"] == 1 else f"{summary['steps']} steps"
    console.print(
        f"{steps} in {duration(summary['seconds'])}, {duration(summary['seconds_per_step'])} a "
        f"step, in {summary['dtype']}; peak memory {size(summary['peak_memory_bytes'])}",
        highlight=False,
    )
    for finding in report.diagnose(summary, report.read_metrics(folder)):
        console.print(f"[yellow]{finding.title}.[/] {finding.text}", highlight=False)
    _where_to_look(console, folder)
    _how_to_use(console, config, folder, str(summary["prompts"][0]))


def _where_to_look(console: Console, folder: Path) -> None:
    places = {
        run_files.REPORT: "everything on one page",
        run_files.BEFORE_AFTER: "the same prompts and seeds, before and after",
        run_files.CURVES: "reward and held-out reward, step by step",
        run_files.LORA: "the LoRA, for diffusers and for ComfyUI and A1111",
    }
    console.print("\nLook at")
    width = max(len(str(folder / name)) for name in places)
    for name, meaning in places.items():
        console.print(
            f"  [cyan]{folder / name!s:<{width}}[/]  {meaning}", soft_wrap=True, highlight=False
        )


def _how_to_use(console: Console, config: RunConfig, folder: Path, prompt: str) -> None:
    model, lora, sampling = config.model.path, str(folder / run_files.LORA), config.train.sampling
    console.print("\nUse it")
    _command(
        console,
        f"rewardprop sample --lora {_quoted(folder)} --compare --output sample.png \\\n"
        f"      --prompts {_quoted(prompt)}",
    )
    console.print("\nor in Python")
    if model == "bundled":
        lines = ["import rewardprop_fast as rpf", "pipe = rpf.models.load_bundled()"]
    else:
        lines = [
            "from diffusers import DiffusionPipeline",
            f"pipe = DiffusionPipeline.from_pretrained({model!r})",
        ]
    lines += [
        f"pipe.load_lora_weights({lora!r})",
        f"pipe({prompt!r}, num_inference_steps={sampling.steps}, "
        f"guidance_scale={sampling.guidance_scale:g}).images[0].save('sample.png')",
    ]
    for line in lines:
        _command(console, line)


def _command(console: Console, line: str) -> None:
    # one line however narrow the terminal, so that it can be copied
    console.print(f"  {line}", style="cyan", markup=False, highlight=False, soft_wrap=True)


def _quoted(text: object) -> str:
    return shlex.quote(str(text))


def _rewards(specs: tuple[RewardConfig, ...]) -> str:
    texts = []
    for spec in specs:
        arguments = ", ".join(f"{key} {value}" for key, value in spec.args.items())
        weight = "" if spec.weight == 1 else f"{spec.weight:g} x "
        texts.append(weight + spec.name + (f" ({arguments})" if arguments else ""))
    return " + ".join(texts)


def _machine(trainer: RewardPropTrainer) -> str:
    dtype = str(trainer.dtype).removeprefix("torch.")
    name = report.device_name(trainer.device)
    if trainer.device.type != "cpu":
        return f"{name} ({trainer.device}), {dtype}"
    threads = torch.get_num_threads()
    return f"{name} (cpu), {dtype}, {threads} thread{'' if threads == 1 else 's'}"


def _count(number_of: int) -> str:
    for unit, factor in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if number_of >= factor:
            return f"{number_of / factor:.3g} {unit}"
    return str(number_of)
