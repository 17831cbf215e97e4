"""Photographs and slopes for the tests of rewards."""

from __future__ import annotations

import functools
import importlib.metadata

import numpy as np
import torch
from matplotlib import cbook
from PIL import Image
from torch.nn import functional as F

PHOTOGRAPHS = ("grace_hopper", "china", "flower")

#: Of a photograph: boxes (left, top, right, bottom), or None for all of it.
SHAPES = {
    "whole": None,
    "sideways": None,
    "square": (100, 20, 500, 420),
    "odd": (3, 5, 440, 338),
    "small": (200, 100, 297, 190),
}


@functools.cache
def photograph(name: str = "grace_hopper") -> Image.Image:
    """One of `PHOTOGRAPHS`, RGB, from a package that ships it.

    grace_hopper: matplotlib, 512 x 600, public domain (US Navy). china and flower: scikit-learn,
    640 x 427, CC BY 2.0 (danielbuechele and vultilion on flickr.com); read without importing it.
    """
    if name == "grace_hopper":
        file = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    else:
        package = importlib.metadata.distribution("scikit-learn")
        file = str(package.locate_file(f"sklearn/datasets/images/{name}.jpg"))
    with Image.open(file) as image:
        return image.convert("RGB")


def picture(name: str, shape: str) -> Image.Image:
    """One of `PHOTOGRAPHS` in one of `SHAPES`."""
    whole, box = photograph(name), SHAPES[shape]
    if shape == "sideways":
        return whole.transpose(Image.Transpose.TRANSPOSE)
    return whole if box is None else whole.crop(box)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def crops(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """(count, 3, size, size): squares of one photograph from all places and of many widths."""
    whole = to_tensor(photograph())
    draw = np.random.default_rng(seed)
    found = []
    for width in draw.integers(size, 400, count):
        top = int(draw.integers(0, whole.shape[2] - width + 1))
        left = int(draw.integers(0, whole.shape[3] - width + 1))
        square = whole[..., top : top + width, left : left + width]
        found.append(F.interpolate(square, (size, size), mode="bicubic", antialias=True))
    return torch.cat(found).clamp(0, 1)


def check_slope(reward, images, prompts=(), metadata=(), step=1e-5, rtol=1e-4, directions=3):
    """The gradient against central differences along random directions, in float64.

    The reward must compute in float64 where the images are.
    """
    images = images.double()
    prompts = list(prompts) or [""] * len(images)
    metadata = list(metadata) or [{}] * len(images)
    leaf = images.clone().requires_grad_(True)
    values = reward(leaf, prompts, metadata)
    assert values.shape == (len(images),)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(len(images), generator=generator, dtype=torch.float64) + 0.5
    (gradient,) = torch.autograd.grad((values.double() * weights).sum(), leaf)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    for _ in range(directions):
        along = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        # along the gradient as well, so that what is compared is not lost among what cancels
        along = along / along.norm() + gradient / gradient.norm()
        with torch.no_grad():
            up = (reward(images + step * along, prompts, metadata).double() * weights).sum()
            down = (reward(images - step * along, prompts, metadata).double() * weights).sum()
        expected = (up - down) / (2 * step)
        torch.testing.assert_close((gradient * along).sum(), expected, rtol=rtol, atol=1e-9)
