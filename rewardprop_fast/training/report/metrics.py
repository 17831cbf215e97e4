"""metrics.jsonl: one JSON object per training step, safe to read while the run goes on."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rewardprop_fast.files import atomic_write
from rewardprop_fast.training import run_files
from rewardprop_fast.training.report.values import strict

PHASES = ("prefix", "suffix", "decode", "reward", "decode_backward", "backward", "update")
"""The parts of a training step in their order; ``seconds_<phase>`` holds each one's time."""

_TENSORBOARD_GROUPS = {
    "reward_mean": "reward/mean",
    "reward_std": "reward/std",
    "heldout_mean": "reward/heldout",
    "diversity": "samples/diversity",
    "drift": "samples/drift",
    "peak_memory_bytes": "resources/peak_memory_bytes",
    "seconds": "seconds/total",
    **{f"seconds_{phase}": f"seconds/{phase}" for phase in PHASES},
}


class MetricsWriter:
    """Appends one line per step to ``run_dir/metrics.jsonl``, and to tensorboard if installed.

    Every line is flushed as it is written, so a killed run loses at most the line it was writing;
    such a torn line is removed when the folder is opened again. Steps must increase: a resumed run
    calls :meth:`truncate` with the step of its checkpoint before it writes.

    Args:
        run_dir: the run's folder; made if missing.
        tensorboard: ``"auto"`` or True writes ``run_dir/tensorboard`` if tensorboard is installed;
            False never does.
    """

    def __init__(
        self, run_dir: str | os.PathLike[str], tensorboard: bool | Literal["auto"] = "auto"
    ) -> None:
        self.path = Path(run_dir) / run_files.METRICS
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._tensorboard_dir = self.path.parent / "tensorboard"
        self._tensorboard = _open_tensorboard(self._tensorboard_dir) if tensorboard else None
        _mend_last_line(self.path)
        self._last_step = max((row["step"] for row in read_metrics(self.path)), default=-1)
        self._file = self.path.open("a", buffering=1, encoding="utf-8", newline="\n")

    def write(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Append ``row``, which must hold an integer ``step``; returns what was written.

        NaN and infinite values are written as null, with the key ``non_finite`` naming them.

        Raises:
            ValueError: no ``step``, or one that is not above the last one written.
            TypeError: a value is neither a number nor a text.
        """
        clean = strict(row)
        step = clean.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"A row of metrics needs an integer 'step'; this one has {step!r}.")
        if step <= self._last_step:
            raise ValueError(
                f"Step {step} comes after step {self._last_step} in {self.path}. A resumed run "
                f"calls truncate({step - 1}) first; a new run needs a new folder."
            )
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = step
        if self._tensorboard is not None:
            for key, value in clean.items():
                if key != "step" and isinstance(value, (int, float)):
                    name = _TENSORBOARD_GROUPS.get(key, f"train/{key}")
                    self._tensorboard.add_scalar(name, value, step)
        return clean

    def truncate(self, step: int) -> int:
        """Drop every line with a step above ``step``, all or none; returns how many."""
        rows = read_metrics(self.path)
        kept = [row for row in rows if row["step"] <= step]
        self._file.close()
        atomic_write(self.path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
        self._file = self.path.open("a", buffering=1, encoding="utf-8", newline="\n")
        self._last_step = max((row["step"] for row in kept), default=-1)
        if self._tensorboard is not None:
            self._tensorboard.close()
            # Tensorboard hides what an earlier writer logged from this step on.
            self._tensorboard = _open_tensorboard(self._tensorboard_dir, purge_step=step + 1)
        return len(rows) - len(kept)

    def close(self) -> None:
        """Close the files. Closing twice is harmless."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl (or of the run folder that holds one), in file order.

    A missing file gives no rows. A torn last line, as a killed run leaves it, is left out.

    Raises:
        ValueError: a line before the last is not a JSON object with a ``step``.
    """
    path = Path(path)
    if path.is_dir():
        path = path / run_files.METRICS
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if index == len(lines) - 1:
                break
            raise ValueError(f"Line {index + 1} of {path} is not JSON: {error}.") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            if index == len(lines) - 1:
                break
            raise ValueError(f"Line {index + 1} of {path} is not a row of metrics with a 'step'.")
        rows.append(row)
    return rows


def _mend_last_line(path: Path) -> None:
    """Let the next row start on its own line: end the last line if it is whole, else cut it."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole == len(data):
        return
    try:
        json.loads(data[whole:])
    except ValueError:
        atomic_write(path, data[:whole])
    else:
        atomic_write(path, data + b"\n")


def _open_tensorboard(directory: Path, purge_step: int | None = None) -> Any | None:
    """A SummaryWriter, or None where tensorboard is not installed (an optional dependency)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    except Exception as error:  # a broken protobuf raises TypeError or AttributeError at import
        warnings.warn(f"tensorboard is installed but does not import ({error}).", stacklevel=3)
        return None
    return SummaryWriter(str(directory), purge_step=purge_step)
