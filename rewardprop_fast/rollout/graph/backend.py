"""Who runs the steps without gradient, one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from rewardprop_fast.rollout.graph.step import Step


class CaptureError(RuntimeError):
    """A step does what a captured graph could not repeat."""


class GraphBackend(ABC):
    """Runs the steps of a chain that carry no gradient."""

    @abstractmethod
    def run(
        self,
        step: Step,
        latents: Tensor,
        shared: Mapping[str, Tensor],
        told: Sequence[Mapping[str, Tensor]],
    ) -> Tensor:
        """x_t -> x after ``len(told)`` steps, (B, 4, h, w), in memory that is the caller's.

        Args:
            shared: the step's tensors that the chain has in common.
            told: those of each step, without its latents.
        """

    @abstractmethod
    def drop(self) -> None:
        """Give back all memory that is held from one chain to the next."""

    @property
    def held_bytes(self) -> int:
        """Memory that is held from one chain to the next, as far as it is known."""
        return 0


class Eager(GraphBackend):
    """Calls every step."""

    def run(
        self,
        step: Step,
        latents: Tensor,
        shared: Mapping[str, Tensor],
        told: Sequence[Mapping[str, Tensor]],
    ) -> Tensor:
        """As `GraphBackend.run`."""
        for own in told:
            latents = step({**shared, **own, "latents": latents})
        return latents

    def drop(self) -> None:
        """There is none."""
