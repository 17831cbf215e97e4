"""Bands for a whole decoder: which parts go back in bands, switched on and off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from rewardprop_fast.memory.bands.head import banded_head
from rewardprop_fast.memory.bands.resnet import (
    banded_resnet,
    check_rows,
    why_not_3x3,
    why_not_parameters,
    why_not_resnet,
)
from rewardprop_fast.memory.bands.rows import ROWS
from rewardprop_fast.nn.legality import has_hooks

#: Pixels from which an image is worth it: below, a block's other tensors weigh as much.
LEAST_PIXELS = 256 * 256


def band_decoder(decoder: nn.Module, rows: int = ROWS, least_pixels: int = LEAST_PIXELS) -> Bands:
    """Let a VAE's decoder go back in bands where its images are large, from now on.

    Gradients are those of before, up to rounding. Without gradients, and where a part is not what
    it expects, everything runs as before. Accelerate the VAE first.

    Args:
        decoder: ``vae.decoder``.
        rows: of a band.
        least_pixels: H W of the smallest image that is worth it.

    Returns:
        What undoes it (`Bands.remove`).

    Raises:
        ValueError: ``rows`` is below 1.
    """
    check_rows(rows)
    return Bands(decoder, rows, least_pixels)


class Bands:
    """A decoder's parts with their forward shadowed by an attribute; see `band_decoder`."""

    def __init__(self, decoder: nn.Module, rows: int, least_pixels: int) -> None:
        self._rows, self._least_pixels = rows, least_pixels
        self._shadowed: list[nn.Module] = []
        self._head_is_banded = False
        for module in decoder.modules():
            if isinstance(module, ResnetBlock2D):
                self._shadow(module, self._resnet(module))
        parts = [getattr(decoder, name, None) for name in ("conv_norm_out", "conv_act", "conv_out")]
        norm, activation, conv = parts
        if isinstance(norm, nn.GroupNorm) and isinstance(activation, nn.SiLU):
            assert isinstance(conv, nn.Module)
            self._head(norm, activation, conv)

    def remove(self) -> None:
        """Undo it."""
        while self._shadowed:
            del self._shadowed.pop().forward

    def _shadow(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        if "forward" not in vars(module):  # somebody else's stays
            module.forward = forward
            self._shadowed.append(module)

    def _is_large(self, x: Tensor) -> bool:
        pixels = x.shape[-2] * x.shape[-1]
        return torch.is_grad_enabled() and x.requires_grad and pixels >= self._least_pixels

    def _resnet(self, block: Any) -> Callable[..., Tensor]:
        plain = block.forward

        def forward(x: Tensor, temb: Any = None, *args: Any, **kwargs: Any) -> Tensor:
            if (
                temb is None
                and not args
                and not kwargs
                and self._is_large(x)
                and why_not_resnet(block, x) is None
            ):
                return banded_resnet(block, x, self._rows)
            result: Tensor = plain(x, temb, *args, **kwargs)
            return result

        return forward

    def _head(self, norm: Any, activation: Any, conv: Any) -> None:
        """Norm and activation hand x on to the convolution, which does all three."""
        plain_norm, plain_activation, plain_conv = norm.forward, activation.forward, conv.forward

        def norm_forward(x: Tensor) -> Tensor:
            self._head_is_banded = (
                self._is_large(x)
                and not has_hooks(norm, activation, conv)
                and (why_not_3x3(conv) or why_not_parameters(x, norm, conv)) is None
            )
            return x if self._head_is_banded else plain_norm(x)

        def activation_forward(x: Tensor) -> Tensor:
            return x if self._head_is_banded else plain_activation(x)

        def conv_forward(x: Tensor) -> Tensor:
            if self._head_is_banded:
                return banded_head(norm, conv, x, self._rows)
            result: Tensor = plain_conv(x)
            return result

        if any("forward" in vars(module) for module in (norm, activation, conv)):
            return
        for module, forward in (
            (norm, norm_forward),
            (activation, activation_forward),
            (conv, conv_forward),
        ):
            self._shadow(module, forward)
