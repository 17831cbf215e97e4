"""The size of the real JPEG file: no gradient, so for DDPO, and for judging a run."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.rewards.jpeg import quantisation_tables


class JPEGSize:
    """Minus the size of the image's JPEG file in kB (1000 bytes), as Pillow writes it.

    The compressibility task of DDPO (arXiv 2305.13301, section 5.1; quality 95 there), and with
    ``larger`` its incompressibility task. Rounding to grey levels and entropy coding have no
    gradient: methods that differentiate the reward refuse it.

    Args:
        quality: 1 to 100.
        larger: plus the size instead.

    Raises:
        ConfigError: an impossible quality.
    """

    differentiable = False

    def __init__(self, quality: int = 95, larger: bool = False) -> None:
        quantisation_tables(quality)  # for its check
        if not isinstance(larger, bool):
            raise ConfigError(f"larger must be true or false, got {larger!r}.")
        self.quality, self.sign = quality, 1 if larger else -1
        self.name = "jpeg_size_larger" if larger else "jpeg_size"

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor:
        sizes = [self.sign * jpeg_bytes(image, self.quality) / 1000 for image in images]
        return torch.tensor(sizes, dtype=torch.float32, device=images.device)


def jpeg_bytes(image: Tensor, quality: int) -> int:
    """Bytes of the file of an image (3, H, W) in [0, 1]; values outside are clamped."""
    levels = (255 * image.detach().float()).round().clamp(0, 255).byte()
    buffer = io.BytesIO()
    pixels = levels.permute(1, 2, 0).contiguous().cpu().numpy()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()
