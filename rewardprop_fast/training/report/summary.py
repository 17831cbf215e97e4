"""summary.json: what a run reached, in one small file that other tools can rely on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewardprop_fast.files import atomic_write
from rewardprop_fast.training import run_files
from rewardprop_fast.training.report.values import strict

SUMMARY_KEYS = (
    "reward_before",
    "reward_after",
    "heldout_before",
    "heldout_after",
    "steps",
    "seconds",
    "seconds_per_step",
    "peak_memory_bytes",
    "device",
    "dtype",
    "versions",
    "method",
    "reward",
    "seed",
    "prompts",
)
"""The keys every summary.json has; a value that was not measured is null."""


def write_summary(run_dir: str | os.PathLike[str], summary: Mapping[str, Any]) -> Path:
    """Write ``run_dir/summary.json`` whole or not at all; returns its path.

    More keys than :data:`SUMMARY_KEYS` are allowed. NaN and infinite numbers become null and are
    named under ``non_finite``.

    Raises:
        ValueError: keys are missing; the message lists all of them.
    """
    missing = [key for key in SUMMARY_KEYS if key not in summary]
    if missing:
        raise ValueError(
            f"summary.json needs {', '.join(missing)}. Give null for what was not measured."
        )
    path = Path(run_dir) / run_files.SUMMARY
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(strict(summary), indent=2, allow_nan=False) + "\n")
    return path


def read_summary(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The run's summary, or an empty dict where the run has not written one yet.

    Raises:
        ValueError: the file is not a JSON object.
    """
    path = Path(run_dir) / run_files.SUMMARY
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path} holds a {type(summary).__name__}, not an object.")
    return summary
