"""Several rewards at once: a weighted sum that can still report its parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.rewards.base import Reward, check_signature, evaluate, name_of
from rewardprop_fast.rewards.normalised import Normalised, measure


class Ensemble(nn.Module):
    """``sum_i weight_i * reward_i(images, prompts, metadata)``.

    ``rewards``: pairs (reward, weight), or a mapping from reward to weight. A negative weight
    penalises. Weights are used as given, and rewards have different scales: put them on one with
    `normalised`, or with `Normalised` members (see docs/rewards.md). Members that are nn.Modules
    move and freeze with the ensemble. Two members of one name are told apart in reports as
    ``name``, ``name_2`` and so on.

    Raises ConfigError for an empty list or a weight that is zero or not a finite number,
    RewardError for a member that is no reward.
    """

    def __init__(self, rewards: Mapping[Reward, float] | Iterable[tuple[Reward, float]]) -> None:
        super().__init__()
        pairs = list(rewards.items() if isinstance(rewards, Mapping) else rewards)
        if not pairs:
            raise ConfigError("An ensemble needs at least one (reward, weight) pair, got none.")
        for pair in pairs:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ConfigError(
                    "An ensemble is made of (reward, weight) pairs, such as "
                    f"Ensemble([(style, 1.0)]), got {pair!r}."
                )
            check_signature(pair[0])
            _check_weight(*pair)
        self.members: tuple[Reward, ...] = tuple(reward for reward, _ in pairs)
        self.member_names = tuple(_distinct([name_of(reward) for reward in self.members]))
        self.weights = tuple(float(weight) for _, weight in pairs)
        self.name = "ensemble(" + ", ".join(self.member_names) + ")"
        # Registered so that .to() and requires_grad_() reach them; `members` also holds plain
        # functions. Each by itself and not as a list, whose parts memory plans take for layers.
        for index, reward in enumerate(self.members):
            if isinstance(reward, nn.Module):
                self.add_module(f"member_{index}", reward)

    def components(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Each member's values (B,) before weighting, by name. A RewardError names the member."""
        return {
            name: evaluate(reward, images, prompts, metadata)
            for name, reward in zip(self.member_names, self.members, strict=True)
        }

    def combine(self, components: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum (B,) of what `components` returned: parts and sum from one call."""
        total = self.weights[0] * components[self.member_names[0]]
        for name, weight in zip(self.member_names[1:], self.weights[1:], strict=True):
            total = total + weight * components[name].to(total.device)
        return total

    def normalised(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]] = ()
    ) -> Ensemble:
        """The same with each member's mean and spread over ``images`` (N, 3, H, W) taken out.

        The numbers stay as they are measured here. Pictures of the base model are the ones to
        measure on: ``trainer.sample(prompts, base=True)``.

        Raises:
            ConfigError: a member is the same for all of them.
        """
        scaled = [
            Normalised(member, *measure(member, images, prompts, metadata))
            for member in self.members
        ]
        return Ensemble(zip(scaled, self.weights, strict=True))

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return self.combine(self.components(images, prompts, metadata))


def _check_weight(reward: Reward, weight: object) -> None:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or weight == 0:  # type: ignore[arg-type]
        raise ConfigError(
            f"The weight of the reward {name_of(reward)!r} must be a finite number other than "
            f"zero, got {weight!r}. To leave a reward out, remove it; to only watch it, make it a "
            "held-out reward."
        )


def _distinct(names: list[str]) -> list[str]:
    taken: set[str] = set()
    for index, name in enumerate(names):
        candidate, count = name, 1
        while candidate in taken:
            count += 1
            candidate = f"{name}_{count}"
        taken.add(candidate)
        names[index] = candidate
    return names
