"""diffusers' blocks on the operators: what spans several layers.

Each is the original's forward with its operations fused; what it does not cover runs as the
original. Sources: diffusers' modules of the same names.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from rewardprop_fast import ops
from rewardprop_fast.nn.hoisted import Context, Moment, embedding_of, embeddings_of
from rewardprop_fast.nn.layers import FastConv2d, group_norm
from rewardprop_fast.nn.legality import has_hooks, is_frozen, is_plain
from rewardprop_fast.nn.lora import linears

#: The widest head that `ops.attention` takes.
_MOST_HEAD_WIDTH = 512


class FastResnetBlock2D(ResnetBlock2D):
    """Both normalisations with their SiLU in one pass each."""

    @staticmethod
    def why_not(block: ResnetBlock2D) -> str | None:
        if block.time_embedding_norm == "scale_shift":
            return "its time embedding scales"
        if type(block.nonlinearity) is not nn.SiLU:
            return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
        return None

    def forward(self, input_tensor: Tensor, temb: Any, *args: Any, **kwargs: Any) -> Tensor:
        norm1, norm2 = self.norm1, self.norm2
        resize = self.upsample if self.upsample is not None else self.downsample
        if (
            args
            or kwargs
            # diffusers leaves channels_last memory there, for a limit of PyTorch's.
            or (resize is not None and input_tensor.shape[0] >= 64)
            or has_hooks(norm1, norm2, self.nonlinearity)
            or not is_plain(input_tensor, norm1.weight, norm1.bias, norm2.weight, norm2.bias)
        ):
            return super().forward(input_tensor, embedding_of(temb), *args, **kwargs)
        hidden = group_norm(norm1, input_tensor, silu=True)
        if resize is not None:
            input_tensor, hidden = resize(input_tensor), resize(hidden)
        hidden = self.conv1(hidden)
        row = temb.row(self) if type(temb) is Moment else None
        if row is not None:
            temb = row
        elif self.time_emb_proj is not None:
            temb = embedding_of(temb)
            temb = temb if self.skip_time_act else self.nonlinearity(temb)
            temb = self.time_emb_proj(temb)[:, :, None, None]
        if temb is not None and self.time_embedding_norm == "default":
            hidden = hidden + temb
        hidden = group_norm(norm2, hidden, silu=True)
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output = input_tensor + hidden
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor


class FastUpsample2D(Upsample2D):
    """Upsampling and the convolution after it in one, without the large image between them."""

    @staticmethod
    def why_not(block: Upsample2D) -> str | None:
        if not block.use_conv or block.use_conv_transpose or not block.interpolate:
            return "it has no upsampling with a convolution after it"
        if block.norm is not None:
            return "it normalises"
        return None

    def forward(
        self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        conv: Any = self.conv if self.name == "conv" else self.Conv2d_0
        if (
            output_size is not None
            or args
            or kwargs
            # Where diffusers leaves channels_last memory, for limits of PyTorch's.
            or hidden_states.shape[0] >= 64
            or 2 * hidden_states.numel() > 2**31
            or not _is_plain_3x3(conv)
            or has_hooks(conv)
            or not is_frozen(conv.weight, conv.bias)
            or not is_plain(hidden_states, conv.weight, conv.bias)
        ):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return ops.frozen_upsample_conv2d(hidden_states, conv.weight, conv.bias)


def _is_plain_3x3(conv: Any) -> bool:
    """Whether it is one that `accelerate` took (no adapter around it), as diffusers builds them."""
    return (
        type(conv) is FastConv2d
        and conv.kernel_size == (3, 3)
        and conv.padding == conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


class FastTransformer2DModel(Transformer2DModel):
    """Tokens become an image again without a copy where the image is in channels_last memory."""

    @staticmethod
    def why_not(model: Transformer2DModel) -> str | None:
        return None if model.is_input_continuous else "its input is no image"

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        image = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        if not residual.is_contiguous(memory_format=torch.channels_last):
            image = image.contiguous()
        if not self.use_linear_projection:
            image = self.proj_out(image)
        return image + residual


class FastBasicTransformerBlock(BasicTransformerBlock):
    """Its three parts as methods: each may be kept, recomputed or offloaded by a memory plan.

    Each takes the residual stream and adds to it, so that what is between two of them is one
    tensor, which the normalisation after it keeps anyway.
    """

    @staticmethod
    def why_not(block: BasicTransformerBlock) -> str | None:
        if block.norm_type != "layer_norm":
            return f"its normalisation is {block.norm_type}"
        if block.pos_embed is not None:
            return "it adds positions"
        if block.attn2 is None:
            return "it has no cross-attention"
        if hasattr(block, "fuser"):
            return "it attends to grounding boxes"
        return None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if (
            attention_mask is not None
            or encoder_attention_mask is not None
            or cross_attention_kwargs
            or self._chunk_size is not None
        ):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                *args,
                **kwargs,
            )
        given = encoder_hidden_states if self.only_cross_attention else None
        hidden_states = self.self_attention(hidden_states, given)
        hidden_states = self.cross_attention(hidden_states, encoder_hidden_states)
        return self.feed_forward(hidden_states)

    def self_attention(self, hidden_states: Tensor, context: Tensor | None) -> Tensor:
        """(B, L, C) -> (B, L, C); context (B, M, D) where the block attends to nothing else."""
        return _attend(self.attn1, self.norm1, hidden_states, context) + hidden_states

    def cross_attention(self, hidden_states: Tensor, context: Tensor | None) -> Tensor:
        """(B, L, C), context (B, M, D) -> (B, L, C)."""
        return _attend(self.attn2, self.norm2, hidden_states, context) + hidden_states

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return _feed(self.ff, self.norm3, hidden_states) + hidden_states


def _attend(attention: Any, norm: Any, x: Tensor, context: Tensor | None) -> Tensor:
    """attention(norm(x), context); ours normalises itself, since it need not keep norm(x) then."""
    if (
        type(attention) is FastAttention
        and "forward" not in vars(attention)
        and not has_hooks(attention)
    ):
        return attention(x, context, norm=norm)
    output: Tensor = attention(norm(x), context)
    return output


def _feed(feed_forward: Any, norm: Any, x: Tensor) -> Tensor:
    """feed_forward(norm(x)); our GEGLU normalises itself, as attention does."""
    first, *rest = feed_forward.net
    if (
        type(feed_forward) is FeedForward
        and type(first) is FastGEGLU
        and not any("forward" in vars(module) for module in (feed_forward, first))
        and not has_hooks(feed_forward, first)
    ):
        x = first(x, norm=norm)
        for layer in rest:
            x = layer(x)
        return x
    output: Tensor = feed_forward(norm(x))
    return output


class FastAttention(Attention):
    """q, k and v from one pass over their input, and attention that keeps no scores.

    Only in place of diffusers' default processor: whichever other is set, now or later, is called.
    """

    @staticmethod
    def why_not(attention: Attention) -> str | None:
        if type(attention.processor) is not AttnProcessor2_0:
            return f"its processor is {type(attention.processor).__name__}"
        for name in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim"):
            if getattr(attention, name) is not None:
                return f"it has a {name}"
        if attention.inner_dim != attention.inner_kv_dim:
            return "its keys are narrower than its queries"
        if attention.inner_dim // attention.heads > _MOST_HEAD_WIDTH:
            return f"its heads are wider than {_MOST_HEAD_WIDTH}"
        return None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        norm: nn.LayerNorm | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """As the original's; with a ``norm``, on norm(hidden_states)."""
        if norm is not None and (self.residual_connection or self.group_norm is not None):
            hidden_states, norm = norm(hidden_states), None
        if (
            type(self.processor) is not AttnProcessor2_0
            or attention_mask is not None
            # temb is for a spatial_norm, which there is none of here; a VAE passes it all the same.
            or cross_attention_kwargs.keys() - {"temb"}
            or not is_plain(hidden_states)
        ):
            if norm is not None:
                hidden_states = norm(hidden_states)
            return super().forward(
                hidden_states,
                embeddings_of(encoder_hidden_states),
                attention_mask,
                **cross_attention_kwargs,
            )
        residual = hidden_states
        if hidden_states.dim() == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if self.group_norm is not None:
            hidden_states = self.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            query, key, value = linears((self.to_q, self.to_k, self.to_v), hidden_states, norm)
        else:
            (query,) = linears((self.to_q,), hidden_states, norm)
            key, value = self.keys_and_values(encoder_hidden_states)
        heads = (
            tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2) for tensor in (query, key, value)
        )
        output = ops.attention(*heads).transpose(1, 2).flatten(2)
        output = self.to_out[1](self.to_out[0](output))
        if residual.dim() == 4:
            output = output.transpose(1, 2).reshape(residual.shape)
        if self.residual_connection:
            output = output + residual
        factor = self.rescale_output_factor
        return output if factor == 1 else output / factor

    def keys_and_values(self, context: Tensor | Context) -> tuple[Tensor, Tensor]:
        """(B, M, C) each, of a context (B, M, D); those that were made beforehand, if they were."""
        pair = context.pairs.get(self) if type(context) is Context else None
        if pair is not None:
            return pair
        key, value = linears((self.to_k, self.to_v), embeddings_of(context))
        return key, value


class FastTimestepEmbedding(TimestepEmbedding):
    """Gives on a `Moment` that it is called on as its condition."""

    def forward(self, sample: Tensor, condition: Any = None) -> Any:
        return condition if type(condition) is Moment else super().forward(sample, condition)


class FastGEGLU(GEGLU):
    """The gate's activation and the product in one pass that keeps the packed input alone."""

    def forward(
        self, hidden_states: Tensor, *args: Any, norm: nn.LayerNorm | None = None, **kwargs: Any
    ) -> Tensor:
        """As the original's; with a ``norm``, on norm(hidden_states)."""
        if args or kwargs or not is_plain(hidden_states):
            if norm is not None:
                hidden_states = norm(hidden_states)
            return super().forward(hidden_states, *args, **kwargs)
        return ops.geglu(*linears((self.proj,), hidden_states, norm))
