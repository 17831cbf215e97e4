"""The sampling chain of one batch, runnable in pieces, each with or without gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewardprop_fast.rollout.conditioning import Conditioning
from rewardprop_fast.rollout.graph import Eager, GraphBackend, Step
from rewardprop_fast.rollout.graph.step import of_one_step
from rewardprop_fast.rollout.schedule import Schedule

if TYPE_CHECKING:
    from rewardprop_fast.rollout.hoisting import Conditions


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
        leaps: step -> its row of coefficients, where it leads elsewhere than the schedule's.
        graphs: who runs the steps before the first gradient: calls them, or replays them.
        reached: (n, latents (B, 4, h, w) at the input of step n), where the chain's first n steps
            were taken before; whoever runs these without gradients is given what came of them.
        merge_lora: the steps before the first gradient run on W + s B A, see `nn.merged_lora`.
    """

    unet: Any
    schedule: Schedule
    conditioning: Conditioning
    guidance_scale: float
    noise: Tensor | None = None
    phase: Callable[[str], AbstractContextManager[None]] = _untimed
    leaps: Mapping[int, Tensor] = field(default_factory=dict)
    graphs: GraphBackend = field(default_factory=Eager)
    reached: tuple[int, Tensor] | None = None
    merge_lora: bool = False

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
        # here, not above: reading a config imports this file and should not wait for diffusers
        from rewardprop_fast.rollout.hoisting import without_time

        first = mask.index(True) if True in mask else len(mask)
        if self.reached is not None and start == 0 and 0 < self.reached[0] <= first:
            start, latents = self.reached
            mask, first = mask[start:], first - start
        if first > 0:
            with self.phase("prefix"), torch.no_grad(), self._lora():
                # a wrapper that minds gradients alone may name what it wraps
                unet = getattr(self.unet, "without_gradients", self.unet)
                conditions = self._conditions(unet)
                step, shared = Step.of(unet, conditions, self._scale)
                told = [self._told(i, conditions) for i in range(start, start + first)]
                with without_time(unet, conditions):
                    latents = self.graphs.run(step, latents, shared, told)
                del conditions, step, shared, told
        if first < len(mask):
            with self.phase("suffix"):
                conditions = self._conditions(self.unet)
                step, shared = Step.of(self.unet, conditions, self._scale)
                for i in range(first, len(mask)):
                    own = self._told(start + i, conditions)
                    latents = step(
                        {**shared, **own, "latents": latents},
                        detach_prediction=not mask[i],
                        detach_input=detach_inputs,
                    )
        return latents

    def leaping(self, start: int, stop: int) -> Sampler:
        """The same chain, but step `start` leads straight to the input of step `stop`.

        `stop` = T is the clean image: step `start` then gives the predicted x_0.
        """
        return replace(self, leaps={**self.leaps, start: self.schedule.leap(start, stop)})

    def _conditions(self, unet: Any) -> Conditions:
        """What the UNet is told, computed as far as it is the same at every step."""
        from rewardprop_fast.rollout.hoisting import hoist

        embeddings, added = self.conditioning.embeddings(), self.conditioning.added()
        return hoist(unet, self.schedule.all_timesteps, embeddings, added)

    def _lora(self) -> AbstractContextManager[None]:
        if not self.merge_lora:
            return nullcontext()
        from rewardprop_fast.nn import merged_lora

        return merged_lora(self.unet)

    @property
    def _scale(self) -> float | None:
        return self.guidance_scale if self.conditioning.guided else None

    def _told(self, index: int, conditions: Conditions) -> dict[str, Tensor]:
        """What step `index` has for itself, beside its latents; see `Step`."""
        moments = conditions.moments
        return of_one_step(
            self.schedule.timesteps[index],
            self.leaps[index] if index in self.leaps else self.schedule.coefficients[index],
            None if self.noise is None else self.noise[index],
            None if moments is None else moments[index - len(self)],  # ours are the last
        )

    def timed(self, phase: Callable[[str], AbstractContextManager[None]]) -> Sampler:
        """The same chain, its phases surrounded by `phase(name)`."""
        return replace(self, phase=phase)

    def repeat(self, times: int, noise: Tensor | None = None) -> Sampler:
        """The same images `times` over, with other noise."""
        return replace(self, conditioning=self.conditioning.repeat(times), noise=noise)
