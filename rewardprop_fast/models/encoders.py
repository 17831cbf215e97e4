"""The networks of a pipeline that only encode, and are not needed once the prompts are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def encoders(pipe: Any) -> list[nn.Module]:
    """Text encoders, and the half of the VAE that turns images into latents."""
    found = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    found += [getattr(pipe.vae, name, None) for name in ("encoder", "quant_conv")]
    return [module for module in found if isinstance(module, nn.Module)]


class Encoders:
    """Lets a pipeline's encoders leave the device and come back.

    Attributes:
        away: whether they have left.
    """

    REST = torch.device("cpu")

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._homes: list[tuple[nn.Module, torch.device]] = []

    @property
    def away(self) -> bool:
        return bool(self._homes)

    def leave(self) -> None:
        """To the host. Nothing happens if they are there."""
        if self.away:
            return
        for module in encoders(self.pipe):
            first = next(module.parameters(), None)
            if first is not None:
                self._homes.append((module, first.device))
                _move(module, self.REST)

    def come_back(self) -> None:
        """To where they were. Nothing happens if they are there."""
        homes, self._homes = self._homes, []
        for module, device in homes:
            _move(module, device)


def _move(module: nn.Module, device: torch.device) -> None:
    # nn.Module's own `to`: transformers' and diffusers' warn and check
    nn.Module.to(module, device)
