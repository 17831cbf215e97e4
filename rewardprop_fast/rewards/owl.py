"""OWL-ViT, v1 (arXiv 2205.06230) and v2 (arXiv 2306.09683): boxes for whatever a text names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, at_least_fp32
from rewardprop_fast.rewards.pretrained import load_model, load_tokenizer


class Owl(nn.Module):
    """Images -> logits of every box for every query, (B, boxes, queries), at least fp32.

    The queries are encoded once, here; neither the text tower nor what places the boxes is kept.

    Raises:
        ConfigError: no query, or one that is no text.
        ModelError: see `load_model`.
    """

    queries: Tensor

    def __init__(
        self, model: str, query: str | Sequence[str], tokenizer: str | None, reward: str
    ) -> None:
        super().__init__()
        texts = _texts(query, reward)
        from transformers import AutoModelForZeroShotObjectDetection

        whole = load_model(AutoModelForZeroShotObjectDetection, model, reward, ("owlvit", "owlv2"))
        second = whole.config.model_type == "owlv2"
        core = whole.owlv2 if second else whole.owlvit
        text = whole.config.text_config
        words = load_tokenizer(model, tokenizer, reward, text.vocab_size)
        tokens = words(
            texts,
            padding="max_length",
            truncation=True,
            max_length=text.max_position_embeddings,
            return_tensors="pt",
        )
        with torch.no_grad():
            pooled = core.text_model(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            ).pooler_output
            queries = F.normalize(core.text_projection(pooled), dim=-1)
        self.register_buffer("queries", queries, persistent=False)
        core.text_model = core.text_projection = whole.box_head = nn.Identity()
        if second:
            whole.objectness_head = nn.Identity()
        self.model = whole
        side = whole.config.vision_config.image_size
        self.preprocess = SquareOnBlack(side) if second else Preprocess((side, side), "stretch")
        self.dtype = torch.float32

    def compute_in(self, dtype: torch.dtype) -> None:
        """The run's compute dtype; of the small class head, at least fp32."""
        self.dtype = dtype
        self.model.to(dtype)
        head_dtype = torch.promote_types(dtype, torch.float32)
        self.model.class_head.to(head_dtype)
        self.queries = self.queries.to(head_dtype)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            pixels = self.preprocess(images).to(self.dtype)
            features = self.model.image_embedder(pixel_values=pixels)[0].flatten(1, 2)
            queries = self.queries.expand(len(images), -1, -1)
            return self.model.class_predictor(at_least_fp32(features), queries)[0]


@dataclass(frozen=True)
class SquareOnBlack:
    """OWLv2's own preprocessing: black at the right or below to a square, then ``side`` pixels.

    Where the picture shrinks, a Gaussian whose width goes with the factor comes first, as in
    scikit-image.
    """

    side: int

    def __call__(self, images: Tensor) -> Tensor:
        images = at_least_fp32(images)
        height, width = images.shape[-2:]
        square = max(height, width)
        images = F.pad(images, (0, square - width, 0, square - height))
        images = blur(images, max(0.0, (square / self.side - 1) / 2))
        images = stretch(images, self.side)
        mean, std = images.new_tensor(CLIP_MEAN), images.new_tensor(CLIP_STD)
        return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def stretch(images: Tensor, side: int) -> Tensor:
    """Squares to ``side`` pixels, bilinear; outside they are mirrored at their outermost pixels.

    As scipy's ``zoom(order=1, mode="mirror", grid_mode=True)``; `F.interpolate` would repeat the
    outermost pixels instead, where the picture grows.
    """
    have = images.shape[-1]
    pixel = (torch.arange(side, device=images.device, dtype=torch.float64) + 0.5) * have / side
    place = ((pixel - 0.5) * 2 / max(have - 1, 1) - 1).to(images.dtype)
    grid = torch.stack(torch.meshgrid(place, place, indexing="xy"), dim=-1)
    return F.grid_sample(
        images,
        grid.expand(len(images), -1, -1, -1),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=True,
    )


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian of ``sigma`` pixels, cut at four of them, the edges mirrored."""
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return images
    place = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (place / sigma).square())
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    images = F.pad(images, (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(images, kernel, groups=3), kernel.mT, groups=3)


def _texts(query: object, reward: str) -> list[str]:
    texts = [query] if isinstance(query, str) else query
    good = isinstance(texts, list | tuple) and all(isinstance(t, str) and t.strip() for t in texts)
    if not good or not texts:
        raise ConfigError(
            f"The reward {reward!r}: query is {query!r}; allowed: what to look for, such as "
            "'a photo of a dog', or a list of such texts."
        )
    assert isinstance(texts, list | tuple)
    return list(texts)
