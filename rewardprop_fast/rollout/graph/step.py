"""The step without gradient as a function of named tensors, which is what a graph can capture.

| name                  | shape           | changes    | where                         |
|-----------------------|-----------------|------------|-------------------------------|
| latents               | (B, 4, h, w)    | every step |                               |
| coefficients          | (3,)            | every step |                               |
| timestep              | () int64        | every step |                               |
| noise                 | (B, 4, h, w)    | every step | eta > 0                       |
| embedding, rows       | (R, D), (R, C)  | every step | hoisted times                 |
| embeddings            | (2B or B, L, D) | a chain    |                               |
| added.*               | (2B or B, P)    | a chain    | SDXL                          |
| key.*, value.*        | (2B or B, L, C) | a chain    | hoisted keys and values       |
| guidance              | ()              | a chain    | guided, where it is a tensor  |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rewardprop_fast.rollout.denoise import denoise

if TYPE_CHECKING:  # reading a config imports this file and should not wait for diffusers
    from rewardprop_fast.nn.hoisted import Moment
    from rewardprop_fast.rollout.hoisting import Conditions

_ADDED = "added."


@dataclass(frozen=True, eq=False)
class Step:
    """What of a chain's steps is no tensor.

    Attributes:
        guidance_scale: of guidance that is told as a number; None where there is none.
        layers: whose keys and values are told, in this order; None where they make their own.
        places: resnet -> its columns of `rows`; None where the UNet embeds the time.
    """

    unet: Any
    guidance_scale: float | None
    layers: tuple[nn.Module, ...] | None
    places: Mapping[nn.Module, tuple[int, int]] | None

    @classmethod
    def of(
        cls, unet: Any, conditions: Conditions, guidance_scale: float | None
    ) -> tuple[Step, dict[str, Tensor]]:
        """The step, and those of its tensors that a whole chain has in common."""
        context, moments = conditions.context, conditions.moments
        shared = {_ADDED + name: tensor for name, tensor in conditions.added.items()}
        layers = None
        if isinstance(context, Tensor):
            shared["embeddings"] = context
        else:
            layers = tuple(context.pairs)
            shared["embeddings"] = context.embeddings
            for i, (key, value) in enumerate(context.pairs.values()):
                shared[f"key.{i}"], shared[f"value.{i}"] = key, value
        return cls(
            unet, guidance_scale, layers, None if moments is None else moments.places
        ), shared

    def __call__(self, told: Mapping[str, Tensor], **detached: bool) -> Tensor:
        """x_{t-1}, (B, 4, h, w). `detached` as in `denoise`."""
        moment, embeddings = None, told["embeddings"]
        context: Any = embeddings
        if self.places is not None or self.layers is not None:
            # here, not above: reading a config imports this file and should not wait for diffusers
            from rewardprop_fast.nn.hoisted import Context, Moment

            if self.places is not None:
                moment = Moment(told["embedding"], told["rows"], self.places)
            if self.layers is not None:
                pairs = {
                    layer: (told[f"key.{i}"], told[f"value.{i}"])
                    for i, layer in enumerate(self.layers)
                }
                context = Context(embeddings, pairs)
        return denoise(
            self.unet,
            told["latents"],
            told["timestep"],
            told["coefficients"],
            context,
            {name.removeprefix(_ADDED): told[name] for name in told if name.startswith(_ADDED)},
            told.get("guidance", self.guidance_scale),
            told.get("noise"),
            moment=moment,
            **detached,
        )


def of_one_step(
    timestep: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    moment: Moment | None,
) -> dict[str, Tensor]:
    """The tensors that one step has for itself, beside its latents."""
    told = {"timestep": timestep, "coefficients": coefficients}
    if noise is not None:
        told["noise"] = noise
    if moment is not None:
        told |= {"embedding": moment.embedding, "rows": moment.rows}
    return told
