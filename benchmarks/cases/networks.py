"""The layers of the networks: every distinct call of a UNet or a VAE decoder, with its count.

Found by running diffusers' own architecture on tensors of the device "meta", so no list of shapes
is kept by hand.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class GroupNormLayer:
    shape: tuple[int, ...]
    groups: int
    eps: float
    silu: bool


@dataclass(frozen=True)
class GegluLayer:
    shape: tuple[int, ...]  # of the packed input


@dataclass(frozen=True)
class LinearLayer:
    tokens: int
    inputs: int
    outputs: int
    bias: bool
    adapted: bool  # whether a LoRA on the UNet's attention projections changes it


@dataclass(frozen=True)
class ProjectionsLayer:
    """Self-attention's q, k and v in a UNet: linear layers on one x, each with a LoRA."""

    tokens: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class ConvLayer:
    shape: tuple[int, ...]
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclass(frozen=True)
class UpsampleConvLayer:
    """Upsampling by two and the 3x3 convolution after it."""

    shape: tuple[int, ...]
    outputs: int


@dataclass(frozen=True)
class AttentionLayer:
    batch: int
    heads: int
    queries: int
    keys: int
    width: int


@dataclass(frozen=True)
class LatentsLayer:
    shape: tuple[int, ...]  # of the latents, guidance not counted


Layer = (
    GroupNormLayer
    | GegluLayer
    | LinearLayer
    | ProjectionsLayer
    | ConvLayer
    | UpsampleConvLayer
    | AttentionLayer
    | LatentsLayer
)

#: The networks by name. "vae" is the decoder of both.
NETWORKS = ("sd15", "sdxl", "vae")


@cache
def layers(network: str, pixels: int, batch: int) -> dict[Layer, int]:
    """The distinct layers of one forward pass and how often each is called.

    Args:
        network: one of `NETWORKS`.
        pixels: width and height of the image; latents have an eighth of it.
        batch: what the network sees: guidance doubles the images for a UNet.
    """
    from rewardprop_fast.models import architectures  # diffusers takes seconds to import

    size = pixels // 8
    found: Counter[Layer] = Counter()
    with torch.device("meta"):
        if network == "vae":
            model: Any = architectures.autoencoder(torch.bfloat16)
            run = partial(model.decode, torch.empty(batch, 4, size, size, dtype=torch.bfloat16))
        else:
            model = architectures.unet(network, torch.bfloat16)
            run = partial(model, **architectures.unet_inputs(model, batch, size, torch.bfloat16))
            found[LatentsLayer((batch // 2, 4, size, size))] += 1
    for name, module in model.named_modules():
        module.register_forward_hook(partial(_note, found, model, name), with_kwargs=True)
    with torch.no_grad():
        run()
    return dict(found)


def _note(
    found: Counter[Layer],
    model: nn.Module,
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    x = next(iter((*args, *kwargs.values())), None)
    parent, _, own = name.rpartition(".")
    if isinstance(module, nn.GroupNorm):
        in_resnet = isinstance(model.get_submodule(parent), ResnetBlock2D)
        silu = in_resnet or own == "conv_norm_out"
        found[GroupNormLayer(tuple(x.shape), module.num_groups, module.eps, silu)] += 1
    elif isinstance(module, GEGLU):
        found[GegluLayer((*x.shape[:-1], module.proj.out_features))] += 1
    elif isinstance(module, Upsample2D):
        found[UpsampleConvLayer(tuple(x.shape), module.out_channels)] += 1
    elif isinstance(module, nn.Conv2d):
        if isinstance(model.get_submodule(parent), Upsample2D):
            return
        padding: Any = module.padding
        layer = ConvLayer(
            tuple(x.shape), module.out_channels, module.kernel_size, module.stride, padding
        )
        found[layer] += 1
    elif isinstance(module, nn.Linear):
        tokens = x.numel() // module.in_features
        adapted = isinstance(model, UNet2DConditionModel) and (
            own in ("to_q", "to_k", "to_v") or name.endswith("to_out.0")
        )
        has_bias = module.bias is not None
        layer_ = LinearLayer(tokens, module.in_features, module.out_features, has_bias, adapted)
        found[layer_] += 1
    elif isinstance(module, Attention):
        adapted = isinstance(model, UNet2DConditionModel)
        _note_attention(found, module, x, kwargs.get("encoder_hidden_states"), adapted)


def _note_attention(
    found: Counter[Layer], module: Any, x: Any, context: Any, adapted: bool
) -> None:
    batch = x.shape[0]
    queries = x.shape[1] if x.dim() == 3 else x.shape[2] * x.shape[3]
    inputs = x.shape[2] if x.dim() == 3 else x.shape[1]
    keys = queries if context is None else context.shape[1]
    width = module.inner_dim // module.heads
    found[AttentionLayer(batch, module.heads, queries, keys, width)] += 1
    if context is None and adapted:
        found[ProjectionsLayer(batch * queries, inputs, module.inner_dim)] += 1
