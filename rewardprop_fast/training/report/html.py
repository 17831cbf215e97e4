"""report.html: a whole run on one page that needs no network, no fonts and no other file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from rewardprop_fast.files import atomic_write
from rewardprop_fast.training import run_files
from rewardprop_fast.training.report import formats
from rewardprop_fast.training.report.curves import (
    PHASE_COLOURS,
    column,
    reward_panel,
    small_panels,
)
from rewardprop_fast.training.report.diagnosis import diagnose
from rewardprop_fast.training.report.metrics import PHASES, read_metrics
from rewardprop_fast.training.report.pictures import embed, timeline
from rewardprop_fast.training.report.summary import read_summary

_BEFORE_AFTER_BUDGET = (
    900_000  # bytes of base64; with the timeline and charts the page stays < 3 MB
)
_TIMELINE_BUDGET = 1_300_000


@dataclass(frozen=True)
class Tile:
    """One number of the headline: its name, its value, and a remark beneath."""

    name: str
    value: str
    remark: str = ""
    before: str | None = None
    good: bool | None = None


@dataclass(frozen=True)
class Phase:
    """One phase's mean seconds per step, and its share of the step in percent."""

    name: str
    seconds: str
    percent: float
    colour: str
    meaning: str


_PHASE_MEANINGS = {
    "prefix": "denoising steps without gradients",
    "suffix": "denoising steps with gradients",
    "decode": "latents to images",
    "reward": "scoring the images",
    "decode_backward": "gradients back to the latents",
    "backward": "gradients back to the LoRA",
    "update": "clipping and the optimizer",
}


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write ``run_dir/report.html`` from what the folder holds; returns its path.

    Reads summary.json, metrics.jsonl, config.yaml, images/step_*.png, before_after.png and the
    names in lora/; every part may be missing, and the page then leaves its section out. Everything
    that comes from the run is escaped. The file is replaced whole, so it may be written while
    training.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: summary.json or metrics.jsonl is damaged.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"There is no run folder {run_dir}.")
    path = run_dir / run_files.REPORT
    atomic_write(path, render_report(run_dir).encode("utf-8"))
    return path


def render_report(run_dir: Path) -> str:
    """The page of :func:`write_report` as text."""
    summary = read_summary(run_dir)
    metrics = sorted(read_metrics(run_dir), key=lambda row: row["step"])
    config = _read_config(run_dir / run_files.CONFIG)
    wide, narrow = reward_panel(metrics), reward_panel(metrics, narrow=True)
    return _template().render(
        title=run_dir.resolve().name,
        headline=_headline(summary, metrics),
        subtitle=_subtitle(summary),
        tiles=_tiles(summary, metrics),
        findings=diagnose(summary, metrics),
        before_after=embed(run_dir / run_files.BEFORE_AFTER, _BEFORE_AFTER_BUDGET),
        # Our own drawings, not the run's text: safe to put in as they are.
        rewards_wide=Markup(wide.svg) if wide else None,
        rewards_narrow=Markup(narrow.svg) if narrow else None,
        panels=[(panel.title, Markup(panel.svg)) for panel in small_panels(metrics)],
        timeline=timeline(run_dir / run_files.IMAGES, _TIMELINE_BUDGET),
        phases=_phases(metrics),
        settings=_settings(config),
        prompts=_prompts(summary),
        environment=_environment(summary),
        usage=_usage(run_dir, summary, config),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html.j2")


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return config if isinstance(config, Mapping) else {}


def _headline(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    before, after = summary.get("reward_before"), summary.get("reward_after")
    if before is not None and after is not None:
        verb = "rose" if after > before else "fell" if after < before else "stayed"
        return f"The reward {verb} from {formats.number(before)} to {formats.number(after)}"
    if metrics:
        return f"{_steps(metrics[-1]['step'])} so far"
    return "Nothing measured yet"


def _subtitle(summary: Mapping[str, Any]) -> str:
    parts = []
    if summary.get("method"):
        parts.append(_text(summary["method"]))
    if summary.get("reward"):
        parts.append(f"towards {_text(summary['reward'])}")
    if summary.get("steps") is not None:
        parts.append(_steps(summary["steps"]))
    if summary.get("device"):
        parts.append(_text(summary["device"]))
    return " · ".join(parts)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _tiles(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[Tile]:
    tiles = []
    for name, key in (("Reward", "reward"), ("Held-out reward", "heldout")):
        before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
        if before is not None and after is not None:
            tiles.append(
                Tile(
                    name,
                    formats.number(after),
                    formats.change(before, after),
                    before=formats.number(before),
                    good=after > before,
                )
            )
        elif len(values := column(metrics, f"{key}_mean")[1]):
            tiles.append(Tile(name, formats.number(float(values[-1])), "at the last step"))
    seconds = summary.get("seconds")
    if seconds is None and metrics:
        seconds = float(column(metrics, "seconds")[1].sum()) or None
    if seconds is not None:
        pace = summary.get("seconds_per_step")
        tiles.append(
            Tile(
                "Time",
                formats.duration(seconds),
                f"{formats.duration(pace)} per step" if pace is not None else "",
            )
        )
    peak = summary.get("peak_memory_bytes")
    if peak is None and len(values := column(metrics, "peak_memory_bytes")[1]):
        peak = float(values.max())
    if peak:
        tiles.append(Tile("Peak memory", formats.size(peak), str(summary.get("dtype") or "")))
    return tiles


def _phases(metrics: Sequence[Mapping[str, Any]]) -> list[Phase]:
    means = {}
    for phase in PHASES:
        values = column(metrics, f"seconds_{phase}")[1]
        if len(values):
            means[phase] = float(values.mean())
    total = sum(means.values())
    if not total > 0:
        return []
    return [
        Phase(
            phase,
            formats.duration(mean),
            round(100 * mean / total, 1),
            PHASE_COLOURS[phase],
            _PHASE_MEANINGS[phase],
        )
        for phase, mean in means.items()
    ]


def _settings(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The config as titled tables: one per group of settings, and per group within a group."""
    tables: list[tuple[str, list[tuple[str, str]]]] = []
    for name, content in config.items():
        title = str(name).replace("_", " ")
        if isinstance(content, list):
            tables.append((title, [_named(entry) for entry in content]))
        elif isinstance(content, Mapping):
            groups = {key: value for key, value in content.items() if isinstance(value, Mapping)}
            plain = [(str(k), _text(v)) for k, v in content.items() if k not in groups]
            tables.append((title, plain))
            for key, group in groups.items():
                rows = [(str(k), _text(v)) for k, v in group.items()]
                tables.append((str(key).replace("_", " "), rows))
        else:
            tables.append((title, [(str(name), _text(content))]))
    return [("LoRA" if title == "lora" else title, rows) for title, rows in tables if rows]


def _named(entry: Any) -> tuple[str, str]:
    """An entry such as ``{name: style, weight: 1.0, args: {copy: reward}}`` in one row."""
    if not isinstance(entry, Mapping):
        return "", _text(entry)
    rest = {key: value for key, value in entry.items() if key not in ("name", "args")}
    if isinstance(arguments := entry.get("args"), Mapping):
        rest |= arguments
    return _text(entry.get("name", "")), _text(rest)


def _prompts(summary: Mapping[str, Any]) -> list[str]:
    prompts = summary.get("prompts")
    return [_text(prompt) for prompt in prompts] if isinstance(prompts, list) else []


def _environment(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(key, _text(summary[key])) for key in ("device", "dtype", "seed") if key in summary]
    versions = summary.get("versions")
    if isinstance(versions, Mapping):
        rows += [(str(name), _text(version)) for name, version in versions.items()]
    return rows


@dataclass(frozen=True)
class Usage:
    """How to use the LoRA: Python for diffusers, and the file that other programs take."""

    code: str
    kohya: str | None


def _usage(run_dir: Path, summary: Mapping[str, Any], config: Mapping[str, Any]) -> Usage | None:
    folder = run_dir / run_files.LORA
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    diffusers_name = "pytorch_lora_weights.safetensors"
    if not names:
        return None
    kohya = next((name for name in names if name != diffusers_name), None)
    model = config.get("model")
    source = model.get("path", "bundled") if isinstance(model, Mapping) else "bundled"
    prompts = _prompts(summary)
    # json.dumps writes a string that is also a Python string, whatever a prompt contains.
    prompt = json.dumps(prompts[0] if prompts else "your prompt", ensure_ascii=False)
    if source == "bundled":
        load = ["import rewardprop_fast as rpf", "", "pipe = rpf.models.load_bundled()"]
    else:
        load = [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({json.dumps(str(source))})",
        ]
    name = diffusers_name if diffusers_name in names else names[0]
    lines = [
        *load,
        f"pipe.load_lora_weights({json.dumps(folder.as_posix())}, weight_name={json.dumps(name)})",
        f'pipe({prompt}).images[0].save("sample.png")',
    ]
    return Usage("\n".join(lines), (folder / kohya).as_posix() if kohya else None)


def _text(value: Any) -> str:
    """A setting as a person writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_text(item)}" for key, item in value.items()) or "none"
    return str(value) if value != "" else "(empty)"
