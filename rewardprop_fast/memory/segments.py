"""The parts of a training step that a memory plan chooses for: which modules, by what name.

A segment is a module's method: its forward, or one of the parts of an accelerated transformer
block. Segments may lie within each other: attention and feed-forward in a transformer block,
everything in the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UpDecoderBlock2D
from torch import nn

from rewardprop_fast.memory.kinds import (
    ATTENTION,
    DECODER_BLOCK,
    FEED_FORWARD,
    RESNET,
    REWARD_BLOCK,
    STEP,
    TRANSFORMER_BLOCK,
)
from rewardprop_fast.nn.blocks import FastBasicTransformerBlock


@dataclass(frozen=True, eq=False)
class Segment:
    """One of them.

    Attributes:
        name: dotted, with the network first: "unet.mid_block.resnets.0", or with a part last:
            "unet.mid_block.attentions.0.transformer_blocks.0.feed_forward".
        kind: one of `kinds.KINDS`.
        module, method: what is called.
    """

    name: str
    kind: str
    module: nn.Module
    method: str = "forward"


def unet_segments(unet: nn.Module, name: str = "unet") -> list[Segment]:
    """The UNet as a whole, its resnets, its transformer blocks and their parts."""
    return [Segment(name, STEP, unet), *_inside(unet, name)]


def vae_segments(vae: nn.Module, name: str = "vae") -> list[Segment]:
    """The decoder's blocks and the resnets and attention in them."""
    decoder = getattr(vae, "decoder", None)
    return list(_inside(decoder, f"{name}.decoder")) if isinstance(decoder, nn.Module) else []


def reward_segments(reward: object, name: str = "reward") -> list[Segment]:
    """The layers of a reward's networks: the members of its outermost lists of modules."""
    if not isinstance(reward, nn.Module):
        return []
    found: dict[nn.Module, Segment] = {}
    for segment in _layers(reward, name):  # towers may share layers
        found.setdefault(segment.module, segment)
    return list(found.values())


def _inside(root: nn.Module, prefix: str) -> Iterator[Segment]:
    for name, module in root.named_modules(prefix=prefix):
        if isinstance(module, BasicTransformerBlock):
            yield Segment(name, TRANSFORMER_BLOCK, module)
            if isinstance(module, FastBasicTransformerBlock):
                yield Segment(f"{name}.self_attention", ATTENTION, module, "self_attention")
                yield Segment(f"{name}.cross_attention", ATTENTION, module, "cross_attention")
                yield Segment(f"{name}.feed_forward", FEED_FORWARD, module, "feed_forward")
        elif isinstance(module, (UpDecoderBlock2D, UNetMidBlock2D)):
            yield Segment(name, DECODER_BLOCK, module)
        elif isinstance(module, ResnetBlock2D):
            yield Segment(name, RESNET, module)
        elif isinstance(module, Attention) and module.residual_connection:
            # a VAE's; a transformer block's are parts of it
            yield Segment(name, ATTENTION, module)


def _layers(root: nn.Module, prefix: str) -> Iterator[Segment]:
    for name, module in root.named_children():
        path = f"{prefix}.{name}"
        members = list(module.children())
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(members) > 1:
            for number, member in enumerate(members):
                if next(member.parameters(), None) is not None:
                    yield Segment(f"{path}.{number}", REWARD_BLOCK, member)
        else:
            yield from _layers(module, path)
