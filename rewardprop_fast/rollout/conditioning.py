"""What the UNet is told beside latents and timestep."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning of B images, each part with B rows; guidance doubles it when it is used.

    Attributes:
        positive: prompt embeddings, (B, L, D).
        negative: embeddings of the negative prompt, (B, L, D), or None without guidance.
        positive_added, negative_added: SDXL's `text_embeds` (B, P) and `time_ids` (B, 6); empty for
            SD 1.x and 2.x.
    """

    positive: Tensor
    negative: Tensor | None = None
    positive_added: dict[str, Tensor] = field(default_factory=dict)
    negative_added: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.positive.shape[0]

    @property
    def guided(self) -> bool:
        return self.negative is not None

    def embeddings(self) -> Tensor:
        """(2B, L, D), negative rows first as diffusers has them; (B, L, D) without guidance."""
        return self.positive if self.negative is None else torch.cat([self.negative, self.positive])

    def added(self) -> dict[str, Tensor]:
        """SDXL's additional conditions, in the order of `embeddings`."""
        if self.negative is None:
            return self.positive_added
        return {
            key: torch.cat([self.negative_added[key], value])
            for key, value in self.positive_added.items()
        }

    def repeat(self, times: int) -> Conditioning:
        """The same B conditions `times` over: rows 0..B-1, 0..B-1, ..."""

        def again(tensor: Tensor) -> Tensor:
            return tensor.repeat(times, *[1] * (tensor.ndim - 1))

        return Conditioning(
            again(self.positive),
            None if self.negative is None else again(self.negative),
            {key: again(value) for key, value in self.positive_added.items()},
            {key: again(value) for key, value in self.negative_added.items()},
        )

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditions on another device."""
        return Conditioning(
            self.positive.to(device),
            None if self.negative is None else self.negative.to(device),
            {key: value.to(device) for key, value in self.positive_added.items()},
            {key: value.to(device) for key, value in self.negative_added.items()},
        )
