"""Images as published models take them: their own processors' steps, in torch, with gradients.

Resizing is antialiased in the way of Pillow (a cubic with a = -1/2, or a triangle, stretched where
the picture shrinks), in fp32. What is left out is that Pillow rounds to whole grey levels after
each direction, which has no gradient: that is a difference of a grey level at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardprop_fast.errors import ModelError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_RESAMPLE: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # Pillow's


@dataclass(frozen=True)
class Preprocess:
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size), normalised; at least fp32.

    Attributes:
        size: (height, width) that come out.
        how: "crop": the shorter side becomes ``shortest``, then the middle is cut out; "stretch":
            both sides become ``size``; "fit": the longer side becomes ``size`` and the rest is
            black, the picture in the middle.
        shortest: pixels; None is the smaller of ``size``.
        offset: of the middle, where it is half a pixel: "down" (transformers) or "even"
            (torchvision, which the models' own code uses).
    """

    size: tuple[int, int]
    how: Literal["crop", "stretch", "fit"] = "crop"
    shortest: int | None = None
    offset: Literal["down", "even"] = "down"
    mode: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, images: Tensor) -> Tensor:
        if images.element_size() < 4:
            images = images.float()
        if self.how == "crop":
            images = self._crop(images)
        elif self.how == "fit":
            images = self._fit(images)
        else:
            images = resize(images, self.size, self.mode)
        mean, std = images.new_tensor(self.mean), images.new_tensor(self.std)
        return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    def _crop(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        short = min(self.size) if self.shortest is None else self.shortest
        if height <= width:
            inner = (short, int(short * width / height))
        else:
            inner = (int(short * height / width), short)
        images = resize(images, inner, self.mode)
        top, left = (self._half(have - want) for have, want in zip(inner, self.size, strict=True))
        return images[..., top : top + self.size[0], left : left + self.size[1]]

    def _half(self, rest: int) -> int:
        return rest // 2 if self.offset == "down" else round(rest / 2)

    def _fit(self, images: Tensor) -> Tensor:
        scale = max(self.size) / max(images.shape[-2:])
        inner = tuple(round(side * scale) for side in images.shape[-2:])
        images = resize(images, (inner[0], inner[1]), self.mode)
        down, right = self.size[0] - inner[0], self.size[1] - inner[1]
        return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))


def resize(
    images: Tensor, size: tuple[int, int], mode: Literal["bilinear", "bicubic"] = "bicubic"
) -> Tensor:
    """Antialiased. Clamped to [0, 1] after each direction, across before down, as Pillow does it:
    cubics overshoot at edges, and bytes cannot. (Pillow 13 goes down first where the height shrinks
    much more than the width; published models were trained with older ones.)
    """
    for inner in ((images.shape[-2], size[1]), tuple(size)):
        if tuple(images.shape[-2:]) != inner:
            images = F.interpolate(images, inner, mode=mode, antialias=True).clamp(0, 1)
    return images


def of_processor(config: Mapping[str, Any] | None, default: Preprocess, reward: str) -> Preprocess:
    """What a preprocessor_config.json says; ``default`` where there is none.

    Raises:
        ModelError: it asks for something that is not known here.
    """
    if config is None:
        return default
    mean = tuple(config.get("image_mean") or default.mean)
    std = tuple(config.get("image_std") or default.std)
    if config.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    number = config.get("resample", 3)
    strange = [
        key for key in ("do_flip_channel_order", "do_pad", "do_thumbnail") if config.get(key)
    ]
    if config.get("do_rescale") is False or config.get("do_resize") is False:
        strange.append("do_rescale or do_resize: false")
    if number not in _RESAMPLE:
        strange.append(f"resample: {number}")
    if len(mean) != 3 or len(std) != 3:
        strange.append("image_mean or image_std of other than three channels")
    try:
        size = _sizes(config.get("size"), default)
        crop = _sizes(config.get("crop_size", config.get("size")), default)
    except (TypeError, ValueError, KeyError):
        strange.append(f"size: {config.get('size')}, crop_size: {config.get('crop_size')}")
        size = crop = default.size
    if strange:
        raise ModelError(
            f"The reward {reward!r}: the model's preprocessor_config.json asks for what is not "
            f"known here ({', '.join(strange)}). Known are resizing (bilinear, bicubic), cutting "
            "out the middle, and normalising."
        )
    same = replace(default, mode=_RESAMPLE[number], mean=mean, std=std)
    square = config.get("size")
    by_side = isinstance(square, int) or (isinstance(square, Mapping) and "shortest_edge" in square)
    if by_side and config.get("crop_pct"):  # ConvNeXt's: small sizes are cut, large ones stretched
        if size[0] >= 384:
            return replace(same, size=size, how="stretch", shortest=None)
        return replace(same, size=size, how="crop", shortest=int(size[0] / config["crop_pct"]))
    if not config.get("do_center_crop", by_side):
        return replace(same, size=size, how="stretch", shortest=None)
    if by_side:
        if size[0] < max(crop):
            raise ModelError(
                f"The reward {reward!r}: the model's preprocessor_config.json cuts {crop} out of "
                f"pictures with a shorter side of {size[0]}; that is more than there is."
            )
        return replace(same, size=crop, how="crop", shortest=size[0])
    if size != crop:
        raise ModelError(
            f"The reward {reward!r}: the model's preprocessor_config.json stretches to {size} and "
            f"then cuts out {crop}; that is not known here."
        )
    return replace(same, size=size, how="stretch", shortest=None)


def _sizes(value: Any, default: Preprocess) -> tuple[int, int]:
    if value is None:
        return default.size
    if isinstance(value, int):
        return value, value
    if "shortest_edge" in value:
        return int(value["shortest_edge"]), int(value["shortest_edge"])
    return int(value["height"]), int(value["width"])


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Scores are not taken in half precision: differences between pictures would be lost."""
    return tensor.to(torch.float32) if tensor.element_size() < 4 else tensor
