"""A training step on fake tensors: its memory and its operations, without weights and without time.

The engine is the one that trains. What differs is that its networks hold no memory, that prompts
are not encoded, and that a value cannot be looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode

from rewardprop_fast import lora
from rewardprop_fast.memory import make_fake
from rewardprop_fast.memory.devices import Device
from rewardprop_fast.memory.meter import Meter
from rewardprop_fast.memory.profile import UPDATE
from rewardprop_fast.memory.repeating import RepeatingFakeMode
from rewardprop_fast.models.shapes import Shapes
from rewardprop_fast.models.support import is_sdxl
from rewardprop_fast.nn import accelerate
from rewardprop_fast.randomness import Draws
from rewardprop_fast.rewards import Reward
from rewardprop_fast.rollout import Conditioning, Schedule
from rewardprop_fast.training.config import TrainConfig
from rewardprop_fast.training.engine import Engine, negative_mean
from rewardprop_fast.training.optimization import LoRAOptimizer
from rewardprop_fast.training.timing import PhaseTimer

#: Steps without gradient that a dry run takes: a second one finds what the first has left.
PREFIX = 2


class DryEngine(Engine):
    """An `Engine` whose values nobody can look at.

    Attributes:
        values_only: whether the method leaves the reward without a gradient. The reward's networks
            then run without; one that has none is not asked, since it may look at values.
    """

    values_only = False

    def _score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        if self.values_only:
            if isinstance(self.reward, nn.Module):
                with torch.no_grad():
                    self.reward(images, prompts, metadata)
            return images.float().mean((1, 2, 3))
        values = self.reward(images, prompts, metadata)
        return values if values.dtype == torch.float64 else values.float()

    def _is_finite(self, loss: Tensor) -> bool:
        return True


@dataclass
class DryRun:
    """A step that can be run any number of times under any tracker and plan.

    Attributes:
        engine: on fake tensors of `mode`.
        config: as it was asked for; the engine's takes fewer steps without gradient.
        trained: the LoRA's parameters.
        meters: what is known of operations, by device.
    """

    mode: RepeatingFakeMode
    engine: DryEngine
    config: TrainConfig
    trained: list[nn.Parameter]
    meters: dict[Device, Meter] = field(default_factory=dict)

    @classmethod
    def of_shapes(cls, shapes: Shapes, reward: Any, config: TrainConfig) -> DryRun:
        """Of networks on "meta", which become fake; ``reward`` too where it is a module."""
        lora.inject(
            shapes.unet, config.lora.rank, config.lora.alpha, config.lora.target_modules, seed=0
        )
        mode = RepeatingFakeMode()
        for network in (shapes.unet, shapes.vae, reward):
            if isinstance(network, nn.Module):
                make_fake(network, mode)
        return cls._of(mode, shapes.unet, shapes.vae, reward, shapes, config)

    @classmethod
    def of_pipeline(cls, pipe: Any, reward: Any, config: TrainConfig) -> DryRun:
        """Of a pipeline that is ready to train, and its reward: copies of both, without memory."""
        mode = RepeatingFakeMode()
        with FakeCopyMode(mode):
            unet, vae = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.vae)
            reward = copy.deepcopy(reward)
        return cls._of(mode, unet, vae, reward, pipe, config)

    @classmethod
    def _of(
        cls, mode: RepeatingFakeMode, unet: Any, vae: Any, reward: Reward, pipe: Any, config: Any
    ) -> DryRun:
        if config.accelerate:
            accelerate(unet)
            accelerate(vae)
        fake = SimpleNamespace(
            unet=unet,
            vae=vae,
            scheduler=pipe.scheduler,
            vae_scale_factor=pipe.vae_scale_factor,
        )
        engine = DryEngine(fake, reward, shortened(config), negative_mean)
        engine.values_only = not config.method.needs_reward_gradient
        sampling = config.sampling
        # all of it: what is made of every timestep beforehand is made of them all
        schedule = Schedule.from_scheduler(pipe.scheduler, sampling.steps, sampling.eta).to(
            engine.device, engine.dtype
        )
        engine.schedule = replace(
            schedule,
            timesteps=mode.from_tensor(schedule.timesteps),
            coefficients=mode.from_tensor(schedule.coefficients),
            signal=mode.from_tensor(schedule.signal),
            noise=mode.from_tensor(schedule.noise),
        )
        tokens = pipe.tokens if isinstance(pipe, Shapes) else pipe.tokenizer.model_max_length
        guided = config.sampling.guided
        engine.encoder = _Encoder(unet, guided, tokens)  # type: ignore[assignment]
        trained = [p for p in unet.parameters() if p.requires_grad]
        return cls(mode, engine, config, trained)

    @cached_property
    def optimizer(self) -> LoRAOptimizer | None:
        """As after an update; None where it is in host memory, apart from the device's."""
        if self.config.optimizer.offload and self._on_card:
            return None
        names = {str(number): parameter for number, parameter in enumerate(self.trained)}
        with self.mode:
            found = LoRAOptimizer(names, self.config.optimizer, self.config.steps, offload=False)
            for group in found.adamw.param_groups:
                group["foreach"] = self._on_card  # PyTorch's default there; fake tensors hide it
            for parameter in self.trained:
                found.adamw.state[parameter] = {
                    "step": torch.tensor(1.0),
                    "exp_avg": torch.empty_like(parameter),
                    "exp_avg_sq": torch.empty_like(parameter),
                }
        return found

    @property
    def _on_card(self) -> bool:
        return self.config.device != "cpu"

    def step(
        self, gradient_steps: int | None = None, prefix: int = PREFIX, update: bool = False
    ) -> None:
        """Run it once; the gradients are gone afterwards.

        Args:
            gradient_steps: K; None is the config's.
            prefix: most UNet calls without gradients.
            update: whether the optimizer updates too, as from its second update on.
        """
        batch, engine = self.config.batch_size, self.engine
        draws = DryDraws(0, 0, tuple(range(batch)), self.config.sampling.steps)
        config, schedule = engine.config, engine.schedule
        k = gradient_steps_of(self.config) if gradient_steps is None else gradient_steps
        count = min(len(schedule), k + prefix)
        method = config.method.with_steps(k)
        with self.mode:
            engine.schedule = schedule.last(count)
            engine.config = replace(config, method=method)
            together = self.config.rollout.prefix_batches
            latents = torch.empty(together * batch, *engine.latent_shape)
            prompts = ["a prompt"] * batch
            facts: list[dict[str, Any]] = [{} for _ in prompts]
            reached = None
            try:
                if together > 1:
                    everyone = replace(draws, samples=tuple(range(together * batch)))
                    timer = PhaseTimer(engine.device, engine.watch)
                    n, x = engine.ahead(prompts * together, latents, everyone, timer)
                    reached = n, x[:batch]  # a view: the others wait for their turn
                engine.step(prompts, facts, latents[:batch], draws, reached=reached)
                if update:
                    self._update()
            finally:
                engine.config, engine.schedule = config, schedule
        for parameter in self.trained:
            parameter.grad = None

    def _update(self) -> None:
        with self.engine.watch(UPDATE):
            if self.optimizer is not None:  # of what is done on the host nothing is here
                self.optimizer.update(0)  # the gradients' norm takes a number a parameter

    def meter(self, device: Device) -> Meter:
        """For one more run of this step, on ``device``."""
        meter = self.meters.setdefault(device, Meter(device))
        meter.begin()
        return meter

    def resident(self, optimizer: bool = True) -> list[Tensor]:
        """What is on the device all the time: weights, and the optimizer's state."""
        networks = [self.engine.pipe.unet, self.engine.pipe.vae, self.engine.reward]
        held = [
            tensor
            for network in networks
            if isinstance(network, nn.Module)
            for tensor in (*network.parameters(), *network.buffers())
        ]
        if optimizer and self.optimizer is not None:
            held += self.optimizer.held()
        return held


def shortened(config: TrainConfig) -> TrainConfig:
    """The same step with fewer UNet calls without gradient, and the most with."""
    k, steps = gradient_steps_of(config), config.sampling.steps
    sampling = replace(config.sampling, steps=min(steps, k + PREFIX))
    return replace(config, method=config.method.with_steps(k), sampling=sampling)


def gradient_steps_of(config: TrainConfig) -> int:
    """The most UNet calls with gradient that a step of this config has: K."""
    return config.method.gradient_steps(config.sampling.steps)


@dataclass(frozen=True)
class DryDraws(Draws):
    """Draws whose numbers are known without being drawn: those in the middle.

    Attributes:
        all_steps: noise is there for so many steps, though fewer are run; 0 is those asked for.
    """

    all_steps: int = 0

    def uniform(self) -> float:
        return 0.5

    def uniforms(self, count: int) -> list[float]:
        return [0.5] * count

    def step_noise(self, steps: int, shape: Sequence[int]) -> Tensor:
        return super().step_noise(max(steps, self.all_steps), shape)


class _Encoder:
    """Conditions of the right shapes."""

    def __init__(self, unet: Any, guided: bool, tokens: int) -> None:
        self.unet, self.guided, self.tokens = unet, guided, tokens

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        config, rows = self.unet.config, len(prompts)
        embeddings = self._empty(rows, self.tokens, config.cross_attention_dim)
        added = {}
        if is_sdxl(SimpleNamespace(unet=self.unet)):
            width = config.projection_class_embeddings_input_dim
            width -= 6 * config.addition_time_embed_dim
            added = {"text_embeds": self._empty(rows, width), "time_ids": self._empty(rows, 6)}
        if not self.guided:
            return Conditioning(embeddings, None, added)
        again = {name: tensor.clone() for name, tensor in added.items()}
        return Conditioning(embeddings, embeddings.clone(), added, again)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.unet.dtype)
