"""Pictures and scores that can be compared over a run: fixed prompts, fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from rewardprop_fast import lora, randomness
from rewardprop_fast.randomness import Draws, Stream
from rewardprop_fast.rewards import Reward, evaluate
from rewardprop_fast.training.engine import Engine, StepResult
from rewardprop_fast.training.gauges import DriftGauge
from rewardprop_fast.training.prompts import PromptSet


@dataclass(frozen=True)
class Evaluation:
    """N fixed prompts, sampled and scored.

    Attributes:
        images: (N, 3, H, W) in [0, 1], on the CPU.
        rewards: (N,).
        heldout: (N,), or None without a held-out reward.
    """

    prompts: list[str]
    images: Tensor
    rewards: Tensor
    heldout: Tensor | None


class Evaluator:
    """Samples outside the training steps, and scores what it or a step has drawn."""

    def __init__(self, engine: Engine, heldout_reward: Reward | None, prompts: PromptSet) -> None:
        self.engine, self.heldout_reward, self.prompts = engine, heldout_reward, prompts
        self._drift: DriftGauge | None = None

    def sample(
        self,
        prompts: Sequence[str],
        seed: int,
        *,
        base: bool,
        strength: float,
        aig: float | None = None,
    ) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] on the CPU, in batches of the config's size."""
        unet = self.engine.pipe.unet
        lora.set_strength(unet, strength)
        try:
            with lora.disabled(unet) if base else nullcontext():
                return sample_in_batches(self.engine, prompts, seed, aig)
        finally:
            lora.set_strength(unet, 1.0)

    def evaluate(self, *, base: bool) -> Evaluation:
        """The run's first prompts, with the LoRA or without it."""
        config = self.engine.config
        index = [i % len(self.prompts) for i in range(config.output.grid_size)]
        prompts = [self.prompts.prompts[i] for i in index]
        facts = [self.prompts.metadata[i] for i in index]
        images = self.sample(prompts, config.seed, base=base, strength=1.0)
        with torch.no_grad():
            here = images.to(self.engine.device)
            rewards = self.engine.score(here, prompts, facts).float().cpu()
            heldout = None
            if self.heldout_reward is not None:
                heldout = evaluate(self.heldout_reward, here, prompts, facts).float().cpu()
        return Evaluation(prompts, images, rewards, heldout)

    @torch.no_grad()
    def heldout_mean(self, results: Sequence[StepResult]) -> float | None:
        """Mean held-out reward of a step's own images; None without a held-out reward."""
        if self.heldout_reward is None:
            return None
        scores = [
            evaluate(self.heldout_reward, result.images, result.prompts, result.metadata)
            for result in results
        ]
        return float(torch.cat(scores).mean())

    def drift(self, step: int) -> float | None:
        """How far the UNet's prediction is from the base model's, relative; see `DriftGauge`.

        None at a step (from 1 on) at which it is not measured.
        """
        config = self.engine.config
        every = config.output.drift_every
        if step not in (1, config.steps) and (every == 0 or step % every != 0):
            return None
        with self.engine.watch("prefix"):
            return self._measured_drift()

    def _measured_drift(self) -> float:
        if self._drift is None:
            # As many as the UNet sees in a step of the chain: a weight that is packed for one shape
            # of image (`ops.onednn`) would otherwise be packed anew.
            config = self.engine.config
            index = range(config.batch_size * (2 if config.sampling.guided else 1))
            prompts = [self.prompts.prompts[i % len(self.prompts)] for i in index]
            draws = Draws(self.engine.config.seed, 0, tuple(range(len(prompts))))
            latents = _latents(self.engine, draws).to(self.engine.device, self.engine.dtype)
            self._drift = DriftGauge(self.engine.sampler(prompts, draws), latents)
        return self._drift()


def sample_in_batches(
    engine: Engine, prompts: Sequence[str], seed: int, aig: float | None = None
) -> Tensor:
    """Images (N, 3, H, W) on the CPU, in batches of the config's size, from the run's noise."""
    size = engine.config.batch_size
    images = []
    for start in range(0, len(prompts), size):
        part = list(prompts[start : start + size])
        draws = Draws(seed, 0, tuple(range(start, start + len(part))))
        images.append(engine.sample(part, _latents(engine, draws), draws, aig).cpu())
    return torch.cat(images)


def _latents(engine: Engine, draws: Draws) -> Tensor:
    return randomness.latents(
        draws.seed, 0, draws.samples, engine.latent_shape, stream=Stream.EVALUATION
    )
