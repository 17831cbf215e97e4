"""DDPO's update: samples, what they are worth, and epochs of gradients over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.methods.ddpo import DDPO
from rewardprop_fast.models import decode
from rewardprop_fast.randomness import Draws
from rewardprop_fast.rollout import Sampler
from rewardprop_fast.training.engine import Engine, StepResult
from rewardprop_fast.training.regularisation import DistanceToBase
from rewardprop_fast.training.timing import PhaseTimer

_LEAST_DEVIATION = 1e-6


@dataclass
class Sampled:
    """A batch that was drawn and rewarded.

    Attributes:
        result: as of any method; the loss and the penalties are those of the gradients added last.
        trajectory: x_T ... x_0, (T + 1, B, 4, h, w), in host memory.
        log_probabilities: under the weights that drew it, (T, B).
        clipped: the share of ratios that were beyond the clip range, () float64; None before.
    """

    result: StepResult
    draws: Draws
    trajectory: Tensor
    log_probabilities: Tensor
    clipped: Tensor | None = None


class RewardHistory:
    """The last rewards of every prompt: what an image's reward is compared with."""

    def __init__(self, method: DDPO) -> None:
        self.method = method
        self.rewards: dict[str, list[float]] = {}

    def advantages(self, prompts: Sequence[str], rewards: Tensor, *, keep: bool = True) -> Tensor:
        """(N,) from the rewards (N,) of an update's images, which are remembered if `keep`."""
        values = rewards.double().tolist()
        known = {prompt: list(past) for prompt, past in self.rewards.items()}
        for prompt, value in zip(prompts, values, strict=True):
            known[prompt] = [*known.get(prompt, []), value][-self.method.history :]
        if keep:
            self.rewards = known
        limit, found = self.method.advantage_clip, []
        for prompt, value in zip(prompts, values, strict=True):
            enough = len(known[prompt]) >= self.method.least_history
            past = torch.tensor(known[prompt] if enough else values, dtype=torch.float64)
            score = (value - past.mean()) / (past.std(correction=0) + _LEAST_DEVIATION)
            found.append(float(score.clamp(-limit, limit)))
        return torch.tensor(found, dtype=rewards.dtype, device=rewards.device)


class PolicyGradient:
    """Runs DDPO's batches on an engine.

    Attributes:
        history: of rewards; part of a run's checkpoint.
    """

    def __init__(self, engine: Engine, method: DDPO) -> None:
        self.engine, self.method = engine, method
        self.history = RewardHistory(method)

    def sample(
        self,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        latents: Tensor,
        draws: Draws,
    ) -> Sampled:
        """Draw, decode and reward a batch, all without gradients."""
        engine = self.engine
        timer = PhaseTimer(engine.device, engine.watch)
        with torch.no_grad():
            sampler = engine.sampler(prompts, draws, timer)
            rollout = self.method.rollout(sampler, latents.to(engine.device, engine.dtype), draws)
            with timer("decode"):
                images = decode(engine.pipe.vae, rollout.latents)
            with timer("reward"):
                rewards = engine.judge(images, list(prompts), list(metadata), draws)
            assert sampler.noise is not None
            assert rollout.trajectory is not None
            # x_{t-1} = mu + sigma z, so that (x_{t-1} - mu) / sigma is the noise that was drawn
            log_probabilities = -sampler.noise.flatten(2).square().mean(2) / 2
        result = StepResult(
            -rewards.mean(),
            rewards,
            images,
            rollout.latents,
            list(prompts),
            list(metadata),
            rollout.gradient_steps,
            seconds=timer.seconds,
        )
        return Sampled(result, draws, rollout.trajectory.cpu(), log_probabilities)

    def backward(self, sampled: Sampled, advantages: Tensor, weight: float = 1.0) -> Sampled:
        """Add the objective's gradient to `.grad` of the LoRA, one step of the chain at a time."""
        engine, draws = self.engine, sampled.draws
        timer = PhaseTimer(engine.device, engine.watch)
        sampler = engine.sampler(sampled.result.prompts, draws, timer)
        steps = self._actions()
        loss = kl = torch.zeros((), dtype=engine.dtype, device=engine.device)
        clipped = loss.double()
        for i in steps:
            one, distance, beyond = self._descend(
                sampler, sampled, i, advantages, weight / len(steps), timer
            )
            loss, kl = loss + one / len(steps), kl + distance / len(steps)
            clipped = clipped + beyond / len(steps)
        penalties = {"kl": kl} if engine.config.kl_coeff else {}
        if engine.pretraining is not None:
            penalties["pretraining_loss"] = engine.pretrain(timer, draws, weight)
        seconds = dict(sampled.result.seconds)
        for name, value in timer.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
        result = replace(sampled.result, loss=loss, penalties=penalties, seconds=seconds)
        return replace(sampled, result=result, clipped=clipped)

    def _actions(self) -> list[int]:
        """Steps of the chain that have a density: those with noise of their own."""
        sigmas = self.engine.schedule.coefficients[:, 2].tolist()
        return [i for i, sigma in enumerate(sigmas) if sigma > 0]

    def _descend(
        self,
        sampler: Sampler,
        sampled: Sampled,
        i: int,
        advantages: Tensor,
        weight: float,
        timer: PhaseTimer,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add the gradient of step i; of it nothing else is left.

        Returns:
            The objective, the distance to the base model (0 where it is not asked for), and the
            share of ratios beyond the clip range; () each, without their graphs.
        """
        engine = self.engine
        unet: Any = sampler.unet
        if engine.config.kl_coeff:
            guided = sampler.conditioning.guided
            unet = DistanceToBase(unet, sampler.guidance_scale if guided else None)
        x, action = (state.to(engine.device) for state in sampled.trajectory[i : i + 2])
        # without its noise, a step leads to the mean
        mean = replace(sampler, unet=unet, noise=None).run(x, i, i + 1, gradients=True)
        sigma = engine.schedule.coefficients[i, 2]
        now = self.method.log_probability(action, mean, sigma)
        then = sampled.log_probabilities[i]
        total = one = self.method.objective(now, then, advantages)
        distance = torch.zeros_like(one)
        if engine.config.kl_coeff:
            distance = unet.mean()
            total = one + engine.config.kl_coeff * distance
        with timer("backward"):
            (total * weight).backward()
        beyond = ((now - then).exp() - 1).abs() > self.method.clip_range
        return one.detach(), distance.detach(), beyond.double().mean()

    def step(
        self,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        latents: Tensor,
        draws: Draws,
        weight: float = 1.0,
    ) -> StepResult:
        """A batch by itself, compared with itself and the history, which stays as it is."""
        sampled = self.sample(prompts, metadata, latents, draws)
        result = sampled.result
        advantages = self.history.advantages(result.prompts, result.rewards, keep=False)
        return self.backward(sampled, advantages, weight).result
