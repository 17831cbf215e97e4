"""What does not change from step to step, computed once for a stretch of the chain.

Keys and values of the prompt for every cross-attention; the embeddings of all T times, SDXL's
further conditions with them, and what every resnet adds of these. Under gradients this is part of
the graph: adapters on such layers get the sum of all steps' gradients through it.

It is for UNets that `rewardprop_fast.accelerate` has been through, whose blocks take it; what is
not accelerated as a whole (modules with hooks, processors or forwards of their own) is computed at
every step, as diffusers does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from rewardprop_fast.nn.blocks import (
    FastAttention,
    FastBasicTransformerBlock,
    FastResnetBlock2D,
    FastTimestepEmbedding,
)
from rewardprop_fast.nn.hoisted import Context, Moment
from rewardprop_fast.nn.legality import has_hooks


@dataclass(frozen=True)
class Moments:
    """All T times of a schedule, as `Moment` has one.

    Attributes:
        embeddings: (T, R, D).
        rows: (T, R, sum of C).
    """

    embeddings: Tensor
    rows: Tensor
    places: Mapping[nn.Module, tuple[int, int]]

    def __getitem__(self, index: int) -> Moment:
        return Moment(self.embeddings[index], self.rows[index], self.places)


@dataclass(frozen=True)
class Conditions:
    """What the UNet's calls are told: tensors, or what was made of these beforehand.

    Attributes:
        context: for `encoder_hidden_states`.
        added: for `added_cond_kwargs`.
        moments: None where the UNet makes its own of a timestep.
    """

    context: Tensor | Context
    added: Mapping[str, Tensor]
    moments: Moments | None = None


def hoist(
    unet: Any, timesteps: Tensor, embeddings: Tensor, added: Mapping[str, Tensor]
) -> Conditions:
    """Compute once what every step would compute again.

    With gradients or without, as it is called; the values are the same to the last bit.

    Args:
        timesteps: (T,), all of the schedule, whichever steps are run: a matrix product of other
            rows may round in another way.
        embeddings: (B, L, D) of the batch as the UNet sees it, guidance included.
        added: SDXL's conditions, likewise.
    """
    if not isinstance(unet, UNet2DConditionModel):
        return Conditions(embeddings, added)
    shared = not torch.is_grad_enabled() and _takes_context(unet)
    context = _context(unet, embeddings) if shared else embeddings
    moments = _moments(unet, timesteps, embeddings, added) if _takes_moments(unet) else None
    return Conditions(context, added, moments)


def _context(unet: nn.Module, embeddings: Tensor) -> Context:
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    attentions: list[Any] = [block.attn2 for block in blocks if block.attn2 is not None]
    attentions += [block.attn1 for block in blocks if block.only_cross_attention]
    return Context(embeddings, {part: part.keys_and_values(embeddings) for part in attentions})


def _moments(
    unet: Any, timesteps: Tensor, embeddings: Tensor, added: Mapping[str, Tensor]
) -> Moments:
    embedding: Tensor = unet.time_embedding(unet.time_proj(timesteps).to(unet.dtype))
    embedding = embedding[:, None]
    further = unet.get_aug_embed(
        emb=embedding, encoder_hidden_states=embeddings, added_cond_kwargs=dict(added)
    )
    if further is not None:
        embedding = embedding + further
    places: dict[nn.Module, tuple[int, int]] = {}
    rows: list[Tensor] = []
    first = 0
    for resnet in unet.modules():
        if isinstance(resnet, ResnetBlock2D) and resnet.time_emb_proj is not None:
            active = embedding if resnet.skip_time_act else resnet.nonlinearity(embedding)
            rows.append(resnet.time_emb_proj(active))
            places[resnet] = (first, rows[-1].shape[-1])
            first += rows[-1].shape[-1]
    return Moments(embedding, torch.cat(rows, -1), places)


def _takes_context(unet: Any) -> bool:
    if unet.encoder_hid_proj is not None:
        return False
    for module in unet.modules():
        if isinstance(module, Attention):
            if type(module) is not FastAttention or _is_altered(module):
                return False
            if type(module.processor) is not AttnProcessor2_0:
                return False
            if not (_is_untouched(module.to_k) and _is_untouched(module.to_v)):
                return False
        elif isinstance(module, BasicTransformerBlock) and (
            type(module) is not FastBasicTransformerBlock or has_hooks(module)
        ):
            return False
    return True


def _takes_moments(unet: Any) -> bool:
    embedding = unet.time_embedding
    if type(embedding) is not FastTimestepEmbedding or not _is_untouched(embedding):
        return False
    if unet.class_embedding is not None or unet.time_embed_act is not None:
        return False
    if unet.config.addition_embed_type not in (None, "text_time"):
        return False
    resnets = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    return bool(resnets) and all(
        type(resnet) is FastResnetBlock2D
        and not has_hooks(resnet, resnet.nonlinearity)
        and _is_untouched(resnet.time_emb_proj)
        and resnet.time_embedding_norm == "default"
        for resnet in resnets
    )


def _is_altered(module: nn.Module) -> bool:
    return "forward" in vars(module) or has_hooks(module)


def _is_untouched(module: nn.Module | None) -> bool:
    """Nobody wants to know when it, or a part of it, is called."""
    return module is None or not any(_is_altered(part) for part in module.modules())


@contextmanager
def without_time(unet: Any, conditions: Conditions) -> Iterator[None]:
    """Inside, the UNet does not embed the time, which the conditions bring along.

    Nothing of the UNet's is changed outside. Only for calls without gradients: those that are
    recomputed in the backward pass find the UNet as it is, and let go of what it has embedded.
    """
    if conditions.moments is None:
        yield
        return
    own = vars(unet)
    own |= {"get_time_embed": _nothing, "get_aug_embed": _nothing}
    try:
        yield
    finally:
        del own["get_time_embed"], own["get_aug_embed"]


def _nothing(**_: Any) -> None:
    return None
