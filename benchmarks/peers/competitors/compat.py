"""This library through TRL's interface: the same script, another import line."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from benchmarks.peers.competitors.shared import fill, inputs, take_gradients, tensors_of
from benchmarks.peers.competitors.trl import seed, settings
from benchmarks.peers.reward import Reward


def make(job: dict[str, Any], variant: str) -> Compat:
    return Compat(job)


class Compat:
    def __init__(self, job: dict[str, Any]) -> None:
        from accelerate import PartialState

        PartialState(cpu=job["device"] == "cpu")
        from rewardprop_fast.compat.trl import (
            AlignPropConfig,
            AlignPropTrainer,
            DefaultDDPOStableDiffusionPipeline,
        )
        from rewardprop_fast.compat.trl import trainer as module

        latents, values = inputs(job)
        prompts = itertools.cycle(job["prompts"])
        self.reward = Reward().to(job["device"])
        self.pipe = DefaultDDPOStableDiffusionPipeline(job["folder"])
        self.trainer = AlignPropTrainer(
            AlignPropConfig(**settings(job)),
            lambda images, prompts, metadata: (self.reward(images, prompts), {}),
            lambda: (next(prompts), {}),
            self.pipe,
        )
        self.module, self.draw_noise = module, module.draw_noise
        self.latents = latents
        fill(self.trainer.parameters, values)
        self._give_latents()

    def _give_latents(self) -> None:
        def given(config: Any, shape: Any, device: Any, dtype: Any) -> tuple[Tensor, Tensor]:
            _, noise = self.draw_noise(config, shape, device, dtype)
            return self.latents.to(device, dtype), noise

        self.module.draw_noise = given

    def gradients(self, random_seed: int | None) -> tuple[dict[str, Tensor], Tensor]:
        if random_seed is None:
            result = self.trainer.backward()
        else:
            import dataclasses

            from rewardprop_fast.rollout import Schedule

            trainer, engine = self.trainer, self.trainer.engine
            before, schedule = trainer.config, engine.schedule
            trainer.config = dataclasses.replace(
                before, truncated_backprop_rand=True, sample_eta=1.0
            )
            engine.schedule = Schedule.from_scheduler(
                self.pipe.scheduler, before.sample_num_steps, 1.0
            ).to(engine.device, engine.dtype)
            self.module.draw_noise = self.draw_noise
            try:
                seed(random_seed)
                result = trainer.backward()
            finally:
                trainer.config, engine.schedule = before, schedule
                self._give_latents()
        return take_gradients(self.trainer.parameters), result.rewards

    def step(self) -> None:
        self.trainer.step(0, 0)

    def held(self) -> Any:
        pipe = self.pipe
        return tensors_of(pipe.unet, pipe.vae, pipe.text_encoder, self.reward)
