"""The sampling chain of one batch, runnable in pieces, each with or without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.rollout.conditioning import Conditioning
from rewardprop_fast.rollout.denoise import denoise
from rewardprop_fast.rollout.schedule import Schedule


def _untimed(_name: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Sampler:
    """A UNet, a schedule and the conditions of B images.

    Methods call `run` over index ranges of the schedule: [0, T - K) without gradients is the
    prefix, [T - K, T) with gradients the suffix.

    Attributes:
        guidance_scale: w; used only where `conditioning` holds negative rows.
        noise: (T, B, 4, h, w) for eta > 0, drawn ahead so that no step draws random numbers.
        phase: `with phase("prefix")` and `with phase("suffix")` surround the work, for timing.
    """

    unet: Any
    schedule: Schedule
    conditioning: Conditioning
    guidance_scale: float
    noise: Tensor | None = None
    phase: Callable[[str], AbstractContextManager[None]] = _untimed

    def __len__(self) -> int:
        return len(self.schedule)

    def run(self, latents: Tensor, start: int, stop: int, *, gradients: bool) -> Tensor:
        """Steps start..stop-1 of the schedule: latents at the input of `start` -> input of `stop`.

        Without gradients this runs under no_grad and builds nothing; the values are bitwise those
        of the same steps with gradients.
        """
        return self.run_masked(latents, start, [gradients] * (stop - start))

    def run_masked(
        self, latents: Tensor, start: int, mask: Sequence[bool], *, detach_inputs: bool = False
    ) -> Tensor:
        """Step `start + i` with gradients through the UNet where mask[i].

        Behind the first such step, a step without keeps the linear path a_t x_t of the update
        (this is what TRL's per-step mask does); before it nothing needs a graph at all.
        With `detach_inputs` gradients leave the UNet at its weights alone, none reaches its input.
        """
        first = mask.index(True) if True in mask else len(mask)
        embeddings, added = self.conditioning.embeddings(), self.conditioning.added()
        scale = self.guidance_scale if self.conditioning.guided else None

        def step(x: Tensor, index: int, detach: bool) -> Tensor:
            return denoise(
                self.unet,
                x,
                self.schedule.timesteps[index],
                self.schedule.coefficients[index],
                embeddings,
                added,
                scale,
                None if self.noise is None else self.noise[index],
                detach_prediction=detach,
                detach_input=detach_inputs,
            )

        if first > 0:
            with self.phase("prefix"), torch.no_grad():
                for i in range(first):
                    latents = step(latents, start + i, False)
        if first < len(mask):
            with self.phase("suffix"):
                for i in range(first, len(mask)):
                    latents = step(latents, start + i, not mask[i])
        return latents

    def leaping(self, start: int, stop: int) -> Sampler:
        """The same chain, but step `start` leads straight to the input of step `stop`.

        `stop` = T is the clean image: step `start` then gives the predicted x_0.
        """
        rows = self.schedule.coefficients.clone()
        rows[start] = self.schedule.leap(start, stop)
        return replace(self, schedule=replace(self.schedule, coefficients=rows))

    def timed(self, phase: Callable[[str], AbstractContextManager[None]]) -> Sampler:
        """The same chain, its phases surrounded by `phase(name)`."""
        return replace(self, phase=phase)

    def repeat(self, times: int, noise: Tensor | None = None) -> Sampler:
        """The same images `times` over, with other noise."""
        return replace(self, conditioning=self.conditioning.repeat(times), noise=noise)
