"""Which class of module is replaced by which: the whole of what `accelerate` changes.

A module of exactly the type ``original`` becomes one of the type ``fast``, its subclass, unless
``why_not`` gives a reason against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from peft.tuners.lora import layer as peft_lora
from torch import nn

from rewardprop_fast.nn import blocks, layers, lora


def is_trained(module: nn.Module) -> str | None:
    """The reason where a parameter of its own asks for a gradient."""
    own = module.parameters(recurse=False)
    return "its weight is trained" if any(p.requires_grad for p in own) else None


def _never(_: nn.Module) -> None:
    return None


@dataclass(frozen=True)
class Replacement:
    """One line of the table."""

    original: type[nn.Module]
    fast: type[nn.Module]
    why_not: Callable[[Any], str | None] = _never


@dataclass(frozen=True)
class Absorption:
    """In modules of the type ``owner``: a normalisation that takes over the SiLU after it."""

    owner: type[nn.Module]
    norm: str
    activation: str


REPLACEMENTS = (
    Replacement(nn.Linear, layers.FastLinear, is_trained),
    Replacement(nn.Conv2d, layers.FastConv2d, is_trained),
    Replacement(nn.GroupNorm, layers.FastGroupNorm, is_trained),
    Replacement(nn.Dropout, layers.FastDropout),
    Replacement(ResnetBlock2D, blocks.FastResnetBlock2D, blocks.FastResnetBlock2D.why_not),
    Replacement(Upsample2D, blocks.FastUpsample2D, blocks.FastUpsample2D.why_not),
    Replacement(
        Transformer2DModel, blocks.FastTransformer2DModel, blocks.FastTransformer2DModel.why_not
    ),
    Replacement(
        BasicTransformerBlock,
        blocks.FastBasicTransformerBlock,
        blocks.FastBasicTransformerBlock.why_not,
    ),
    Replacement(Attention, blocks.FastAttention, blocks.FastAttention.why_not),
    Replacement(TimestepEmbedding, blocks.FastTimestepEmbedding),
    Replacement(GEGLU, blocks.FastGEGLU),
    Replacement(peft_lora.Linear, lora.FastLoraLinear),
    Replacement(peft_lora.Conv2d, lora.FastLoraConv2d),
)

ABSORPTIONS = (
    Absorption(UNet2DConditionModel, "conv_norm_out", "conv_act"),
    Absorption(Encoder, "conv_norm_out", "conv_act"),
    Absorption(Decoder, "conv_norm_out", "conv_act"),
)

#: Where a fast class comes from: the way back.
ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {
    **{line.fast: line.original for line in REPLACEMENTS},
    layers.FastGroupNormSiLU: nn.GroupNorm,
    layers.AbsorbedSiLU: nn.SiLU,
}
