"""What every method is: settings, a check of them, and a rollout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rewardprop_fast.randomness import Draws
from rewardprop_fast.rollout import Sampler

#: (images (N, 3, H, W), prompts, metadata) -> (N,), held to a reward's contract.
Score = Callable[[Tensor, list[str], list[dict[str, Any]]], Tensor]


@dataclass(frozen=True)
class Rollout:
    """What a method hands to decode and reward.

    Attributes:
        latents: x_0 with its graph, (copies * B, 4, h, w): all B images of copy 0, then of copy 1.
        copies: endpoints per image; prompts and metadata are repeated to match.
        gradient_steps: UNet calls per endpoint that carry gradients (K).
        weight: factor on the loss's gradient.
        trajectory: x_T ... x_0, (T + 1, B, 4, h, w), of a method that needs them all (DDPO).
    """

    latents: Tensor
    copies: int
    gradient_steps: int
    weight: float = 1.0
    trajectory: Tensor | None = None


@dataclass(frozen=True)
class Method(ABC):
    """A frozen set of settings that knows how to run a rollout.

    What a memory plan must know is said by `gradient_steps`, `plain_steps`,
    `common_steps` and `with_steps`.

    Attributes:
        needs_reward_gradient: whether the reward must be differentiable in the images.
    """

    name: ClassVar[str]
    needs_reward_gradient: ClassVar[bool] = True

    @abstractmethod
    def validate(self, steps: int) -> list[str]:
        """What is wrong with the settings for a chain of `steps`; empty if nothing is."""

    @abstractmethod
    def rollout(self, sampler: Sampler, latents: Tensor, draws: Draws) -> Rollout:
        """From noise x_T (B, 4, h, w) to endpoints x_0 through which gradients reach the LoRA."""

    def score(
        self,
        reward: Score,
        images: Tensor,
        prompts: list[str],
        metadata: list[dict[str, Any]],
    ) -> Tensor:
        """What is to rise, (N,): the reward of the images (N, 3, H, W), unless a method differs."""
        return reward(images, prompts, metadata)

    def refuses(
        self, reward: Score, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[str]:
        """Why a reward is of no use to this method, tried on a few images; empty if it is."""
        return []

    def refuses_eta(self, eta: float) -> list[str]:
        """What is wrong with DDIM's eta for this method; empty if nothing is."""
        return []

    def refuses_batches(self, batches: int) -> list[str]:
        """What is wrong with so many batches a training step; empty if nothing is."""
        return []

    def kl_weight(self) -> float:
        """Weight of the distance to the base model's predictions that belongs to the method."""
        return 0.0

    def gradient_steps(self, steps: int) -> int:
        """The most UNet calls with gradients that are held at once, in a chain of `steps`."""
        return steps

    def plain_steps(self, steps: int) -> int:
        """UNet calls without gradients in front of those with."""
        return steps - self.gradient_steps(steps)

    def common_steps(self, steps: int, draws: Draws) -> int:
        """Steps from the first on that `rollout` takes without gradients, given these draws.

        Several batches of one training step may take them together.
        """
        return 0

    def with_steps(self, k: int) -> Method:
        """A method of the same memory that has exactly k steps with gradients, whatever is drawn.

        A dry run asks for it, also with smaller k than the method's own.
        """
        return self


def run_suffix(sampler: Sampler, latents: Tensor, k: int) -> Rollout:
    """T - K steps without gradients, K with: the chain that DRaFT and AlignProp share."""
    steps = len(sampler)
    latents = sampler.run(latents, 0, steps - k, gradients=False)
    return Rollout(sampler.run(latents, steps - k, steps, gradients=True), 1, k)
