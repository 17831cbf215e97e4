"""When to stop before the end: a held-out reward that falls, images that become alike."""

from __future__ import annotations

from typing import Any

from rewardprop_fast.training.config import EarlyStoppingConfig
from rewardprop_fast.training.evaluation import Evaluation
from rewardprop_fast.training.gauges import diversity


class EarlyStopping:
    """Looks at the run's fixed evaluation images, always of the same prompts and noise.

    Args:
        config: what to look for.
        base: the evaluation images of the base model.
    """

    def __init__(self, config: EarlyStoppingConfig, base: Evaluation) -> None:
        self.config = config
        self.base_diversity = diversity(base.images)
        self.best: float | None = None if base.heldout is None else float(base.heldout.mean())

    def wanted(self, step: int) -> bool:
        """Whether the images are to be looked at behind this step."""
        return self.config.active and step % self.config.every == 0

    def reason(self, seen: Evaluation) -> str | None:
        """Why to stop, in words, or None to go on."""
        config, found = self.config, diversity(seen.images)
        if config.diversity_share is not None and found is not None:
            assert self.base_diversity is not None
            if found < config.diversity_share * self.base_diversity:
                return (
                    f"the images' diversity fell to {found:.4g}, below {config.diversity_share:g} "
                    f"of the base model's {self.base_diversity:.4g}"
                )
        if config.heldout_fall is not None and seen.heldout is not None:
            heldout = float(seen.heldout.mean())
            assert self.best is not None
            if heldout < self.best - config.heldout_fall:
                return (
                    f"the held-out reward fell to {heldout:.4g}, more than "
                    f"{config.heldout_fall:g} below its best, {self.best:.4g}"
                )
            self.best = max(self.best, heldout)
        return None

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": self.best}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        if state.get("best") is not None:
            self.best = float(state["best"])
