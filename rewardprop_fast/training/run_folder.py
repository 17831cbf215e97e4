"""The folder a run writes: who owns it, and where everything lies in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.files import atomic_write
from rewardprop_fast.training import report, run_files
from rewardprop_fast.training.config_io import dump_yaml


class RunFolder:
    """Files of one run. A folder that holds another run is refused unless that one is resumed."""

    def __init__(self, path: Path, resumed: bool) -> None:
        self.path = path
        if not resumed and (path / run_files.METRICS).exists():
            raise ConfigError(
                f"{path} already holds a run. Resume it, or choose another train.output.directory; "
                "nothing there has been touched."
            )
        try:
            (path / run_files.IMAGES).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"The run folder {path} cannot be made: {error.strerror or error}."
            ) from error

    def write_config(self, settings: dict[str, Any]) -> None:
        """config.yaml, with every default spelled out."""
        atomic_write(self.path / run_files.CONFIG, dump_yaml(settings))

    def write_plan(self, text: str) -> None:
        """plan.json, as `memory_budget` takes it again."""
        atomic_write(self.path / run_files.PLAN, text)

    def write_images(self, step: int, images: Tensor, prompts: Sequence[str]) -> None:
        """images/step_000100.png."""
        grid = report.image_grid(images, list(prompts))
        grid.save(self.path / run_files.IMAGES / f"step_{step:06d}.png")

    def write_before_after(
        self,
        before: Tensor,
        after: Tensor,
        prompts: Sequence[str],
        rewards_before: Tensor,
        rewards_after: Tensor,
    ) -> None:
        """before_after.png."""
        grid = report.before_after_grid(before, after, prompts, rewards_before, rewards_after)
        grid.save(self.path / run_files.BEFORE_AFTER)

    def finish(self, summary: dict[str, Any]) -> None:
        """curves.png, summary.json and report.html."""
        report.plot_reward_curves(report.read_metrics(self.path), self.path / run_files.CURVES)
        report.write_summary(self.path, summary)
        report.write_report(self.path)
