"""One training step (rollout, decode, reward, backward) and plain sampling; no files, no loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.errors import ModelError, NonFiniteError, NonFiniteRewardError
from rewardprop_fast.lora import Annealed
from rewardprop_fast.models import EmbeddingCache, PromptEncoder, check_size, decode, default_size
from rewardprop_fast.randomness import Draws
from rewardprop_fast.rewards import Reward, evaluate
from rewardprop_fast.rollout import Sampler, Schedule
from rewardprop_fast.rollout.graph import Eager, GraphBackend
from rewardprop_fast.training.config import TrainConfig
from rewardprop_fast.training.regularisation import DistanceToBase, Pretraining
from rewardprop_fast.training.timing import PhaseTimer, Watch, unwatched

Loss = Callable[[Tensor], Tensor]


def negative_mean(rewards: Tensor) -> Tensor:
    """The default loss, -mean(reward), (B,) -> ()."""
    return -rewards.mean()


@dataclass(frozen=True)
class StepResult:
    """What one batch gave. The gradients are on the LoRA parameters.

    Attributes:
        loss: () detached.
        rewards: (N,) detached, N = copies * B endpoints (copies > 1 for DRaFT-LV); of what the
            method lets rise, which for SRPO is a difference of rewards.
        images: (N, 3, H, W) detached, in [0, 1].
        latents: x_0, (N, 4, h, w) detached.
        prompts: N prompts, as the rewards saw them.
        metadata: N dicts.
        gradient_steps: K, UNet calls per endpoint that carried gradients.
        penalties: name -> value of what regularises, () detached and without its weight: "kl" and
            "pretraining_loss", where they are asked for.
        seconds: phase -> seconds.
    """

    loss: Tensor
    rewards: Tensor
    images: Tensor
    latents: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]
    gradient_steps: int
    penalties: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Engine:
    """The pipeline, the reward and the method, ready to run batches.

    Expects the pipeline on its device, in its dtype, frozen, with the LoRA attached.

    Attributes:
        watch: surrounds each phase of a step: "prefix", "suffix", "decode", "reward",
            "decode_backward" (of reward and decoder) and "backward" (of the chain).
        graphs: who runs the steps without gradient.
        pretraining: images to go on knowing, where the config asks for that.
    """

    watch: Watch = staticmethod(unwatched)
    graphs: GraphBackend = Eager()
    pretraining: Pretraining | None = None

    def __init__(self, pipe: Any, reward: Reward, config: TrainConfig, loss: Loss) -> None:
        self.pipe, self.reward, self.config, self.loss = pipe, reward, config, loss
        sampling = config.sampling
        own_height, own_width = default_size(pipe)
        self.height, self.width = sampling.height or own_height, sampling.width or own_width
        check_size(pipe, self.height, self.width)
        self.device = pipe.unet.device
        self.dtype = torch.float64 if pipe.unet.dtype == torch.float64 else torch.float32
        self.schedule = Schedule.from_scheduler(pipe.scheduler, sampling.steps, sampling.eta).to(
            self.device, self.dtype
        )
        if self.schedule.coefficients[-1, 1] == 0:
            raise ModelError(
                "The scheduler's last step is at timestep 0 and leaves the image as it is, so no "
                "gradient would come from it. Set steps_offset to 1, or set_alpha_to_one to true, "
                "in scheduler_config.json."
            )
        # as in diffusers, a scale of 1 or less means no guidance
        self.encoder = PromptEncoder(
            pipe,
            self.height,
            self.width,
            sampling.negative_prompt,
            guided=sampling.guided,
            cache=EmbeddingCache(config.encoding.cache) if config.encoding.cache else None,
        )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(4, h, w) of one image."""
        scale = self.pipe.vae_scale_factor
        return (
            self.pipe.unet.config.in_channels,
            self.height // scale,
            self.width // scale,
        )

    def sampler(
        self, prompts: Sequence[str], draws: Draws, timer: PhaseTimer | None = None
    ) -> Sampler:
        """The sampling chain for these prompts, with the noise of eta > 0 drawn ahead."""
        noise = None
        if self.schedule.eta > 0:
            noise = draws.step_noise(len(self.schedule), self.latent_shape)
            noise = noise.to(self.device, self.dtype)
        sampler = Sampler(
            self.pipe.unet,
            self.schedule,
            self.encoder(prompts),
            self.config.sampling.guidance_scale,
            noise,
            graphs=self.graphs,
        )
        return sampler if timer is None else sampler.timed(timer)

    def step(
        self,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        latents: Tensor,
        draws: Draws,
        weight: float = 1.0,
        reached: tuple[int, Tensor] | None = None,
    ) -> StepResult:
        """Rollout, decode, reward and backward for one batch; adds to `.grad` of the LoRA.

        Args:
            latents: x_T, (B, 4, h, w) standard normal.
            weight: factor on the loss's gradient, 1 / accumulation_steps.
            reached: what `ahead` gave for this batch, or None.

        Raises:
            NonFiniteError: a reward or the loss is NaN or infinite; nothing was back-propagated.
        """
        timer = PhaseTimer(self.device, self.watch)
        sampler = replace(self._training_sampler(prompts, draws, timer), reached=reached)
        distance = None
        if self.config.kl_coeff:
            scale = sampler.guidance_scale if sampler.conditioning.guided else None
            distance = DistanceToBase(sampler.unet, scale)
            sampler = replace(sampler, unet=distance)
        rollout = self.config.method.rollout(sampler, latents.to(self.device, self.dtype), draws)
        names = list(prompts) * rollout.copies
        facts = list(metadata) * rollout.copies
        # The chain's gradient waits for that of decoder and reward, which are done with then.
        endpoints = rollout.latents.detach().requires_grad_()
        with timer("decode"):
            images = decode(self.pipe.vae, endpoints)
        with timer("reward"):
            rewards = self.judge(images, names, facts, draws)
            loss = self.loss(rewards)
        if not self._is_finite(loss):
            raise NonFiniteError(f"The loss is {loss.item()} {where(draws, prompts)}")
        with timer("decode_backward"):
            (loss * (weight * rollout.weight)).backward()
        roots, gradients = [rollout.latents], [endpoints.grad]
        penalties: dict[str, Tensor] = {}
        if distance is not None:
            kl = distance.mean()
            roots.append(kl)
            gradients.append(torch.full_like(kl, self.config.kl_coeff * weight))
            penalties["kl"] = kl.detach()
        with timer("backward"):
            torch.autograd.backward(roots, gradients)
        if self.pretraining is not None:
            penalties["pretraining_loss"] = self.pretrain(timer, draws, weight)
        return StepResult(
            loss.detach(),
            rewards.detach(),
            images.detach(),
            rollout.latents.detach(),
            names,
            facts,
            rollout.gradient_steps,
            penalties,
            timer.seconds,
        )

    def ahead(
        self, prompts: Sequence[str], latents: Tensor, draws: Draws, timer: PhaseTimer
    ) -> tuple[int, Tensor]:
        """The steps without gradients that all these images begin with, in one batch.

        Args:
            prompts, latents, draws: those of several batches, one behind the other.

        Returns:
            n, and the latents at the input of step n. With n = 0 nothing was run.
        """
        count = self.config.method.common_steps(len(self.schedule), draws)
        x = latents.to(self.device, self.dtype)
        if count == 0:
            return 0, x
        sampler = self._training_sampler(prompts, draws, timer)
        return count, sampler.run(x, 0, count, gradients=False)

    def _training_sampler(self, prompts: Sequence[str], draws: Draws, timer: PhaseTimer) -> Sampler:
        merge = self.config.rollout.merge_lora  # images that are looked at are the adapter's own
        return replace(self.sampler(prompts, draws, timer), merge_lora=merge)

    def judge(
        self,
        images: Tensor,
        prompts: list[str],
        metadata: list[dict[str, Any]],
        draws: Draws,
    ) -> Tensor:
        """What is to rise, (N,), of a step's images (N, 3, H, W). Errors: NonFiniteError."""
        try:
            return self.config.method.score(self._score, images, prompts, metadata)
        except NonFiniteRewardError as error:
            batch = prompts[: len(draws.samples)]  # behind them further copies' of DRaFT-LV
            raise NonFiniteError(f"{error} It was {where(draws, batch)}") from error

    def pretrain(self, timer: PhaseTimer, draws: Draws, weight: float) -> Tensor:
        """Add the gradient of the pretraining loss; behind the chain's, so that each has its turn.

        It holds no more than one step of a chain does, which memory plans rely on.
        """
        assert self.pretraining is not None
        _ = self.pretraining.latents  # made before the phase that needs them
        with timer("suffix"):
            loss = self.pretraining.loss(draws)
        with timer("backward"):
            (loss * (self.config.regularisation.pretraining_coeff * weight)).backward()
        return loss.detach()

    def _score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return evaluate(self.reward, images, prompts, metadata)

    def _is_finite(self, loss: Tensor) -> bool:
        return bool(torch.isfinite(loss))

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], latents: Tensor, draws: Draws, aig: float | None = None
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] from noise x_T (B, 4, h, w).

        Args:
            aig: power of annealed importance guidance, see `lora.Annealed`; None is without.
        """
        sampler = self.sampler(prompts, draws, PhaseTimer(self.device, self.watch))
        if aig is not None:
            sampler = replace(sampler, unet=Annealed(sampler.unet, len(sampler), aig))
        x0 = sampler.run(latents.to(self.device, self.dtype), 0, len(sampler), gradients=False)
        with self.watch("decode"):
            return decode(self.pipe.vae, x0)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """The reward of images (N, 3, H, W) that are there already, (N,)."""
        with self.watch("reward"):
            return self._score(images, prompts, metadata)


def where(draws: Draws, prompts: Sequence[str]) -> str:
    """The part of an error message that lets the failing batch be run again."""
    return (
        f"in step {draws.step + 1}, seed {draws.seed}, for the prompts {list(prompts)!r}. The "
        "weights have not been changed. Lower the learning rate or max_grad_norm, use dtype "
        "float32, or run trainer.training_step with these to look closer."
    )
