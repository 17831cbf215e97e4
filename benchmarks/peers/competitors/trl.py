"""TRL 0.23.1's own trainer, its own step. SD 1.x only."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from benchmarks.peers.competitors.shared import (
    fill,
    inputs,
    lora_parameters,
    take_gradients,
    tensors_of,
)
from benchmarks.peers.reward import Reward
from benchmarks.peers.workloads import LEARNING_RATE


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """Of AlignPropConfig, TRL's and this library's."""
    return {
        "mixed_precision": {"float32": "no", "bfloat16": "bf16"}[job["dtype"]],
        "sample_num_steps": job["steps"],
        "sample_eta": 0.0,
        "sample_guidance_scale": job["guidance"],
        "train_batch_size": job["batch"],
        "train_learning_rate": LEARNING_RATE,
        "truncated_backprop_rand": False,
        "truncated_backprop_timestep": job["steps"] - job["k"],
        "truncated_rand_backprop_minmax": (0, job["steps"] - 1),
        "num_epochs": 10**9,
        "save_freq": 10**9,
    }


def seed(number: int) -> None:
    """Every global generator."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def make(job: dict[str, Any], variant: str) -> TRL:
    return TRL(job)


class TRL:
    def __init__(self, job: dict[str, Any]) -> None:
        PartialState(cpu=job["device"] == "cpu")
        from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

        latents, values = inputs(job)
        self.prompts = itertools.cycle(job["prompts"])
        reward = Reward().to(job["device"])

        class Pipeline(DefaultDDPOStableDiffusionPipeline):  # type: ignore[misc]
            """TRL's, started from given noise."""

            latents: Tensor | None = None

            def rgb_with_grad(self, *args: Any, **kwargs: Any) -> Any:
                start = None if self.latents is None else self.latents.clone()
                return super().rgb_with_grad(*args, latents=start, **kwargs)

        self.pipe = Pipeline(job["folder"])
        self.trainer = AlignPropTrainer(
            AlignPropConfig(**settings(job)),
            lambda images, prompts, metadata: (reward(images, prompts), {}),
            lambda: (next(self.prompts), {}),
            self.pipe,
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.reward = reward
        self.latents = latents.to(job["device"], self.pipe.unet.dtype)
        self.parameters = lora_parameters(self.pipe.unet)
        fill(self.parameters, values)

    def gradients(self, random_seed: int | None) -> tuple[dict[str, Tensor], Tensor]:
        config = self.trainer.config
        self.pipe.latents = self.latents
        if random_seed is not None:
            # its own noise and its random truncation
            config.truncated_backprop_rand, config.sample_eta = True, 1.0
            self.pipe.latents = None
            seed(random_seed)
        try:
            # as in its `step`, without the update
            pairs = self.trainer._generate_samples(batch_size=config.train_batch_size)
            rewards = self.trainer.compute_rewards(pairs)
            self.trainer.accelerator.backward(self.trainer.calculate_loss(rewards))
        finally:
            config.truncated_backprop_rand, config.sample_eta = False, 0.0
        return take_gradients(self.parameters), rewards.detach()

    def step(self) -> None:
        self.pipe.latents = self.latents
        self.trainer.step(0, 0)

    def held(self) -> Any:
        pipe = self.pipe
        return tensors_of(pipe.unet, pipe.vae, pipe.text_encoder, self.reward)
