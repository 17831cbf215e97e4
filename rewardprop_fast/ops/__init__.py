"""Fused operators, a folder each: its rule, its plain PyTorch specification, its fast forms."""

from __future__ import annotations

from rewardprop_fast.ops.attention import ATTENTION, attention
from rewardprop_fast.ops.frozen_conv2d import FROZEN_CONV2D, frozen_conv2d
from rewardprop_fast.ops.frozen_linear import FROZEN_LINEAR, frozen_linear
from rewardprop_fast.ops.frozen_upsample_conv2d import (
    FROZEN_UPSAMPLE_CONV2D,
    frozen_upsample_conv2d,
)
from rewardprop_fast.ops.geglu import GEGLU, geglu
from rewardprop_fast.ops.group_norm_silu import GROUP_NORM_SILU, group_norm
from rewardprop_fast.ops.guided_ddim_step import GUIDED_DDIM_STEP, guided_ddim_step
from rewardprop_fast.ops.lora_linear import (
    LORA_LINEAR,
    layer_norm_lora_linears,
    lora_linear,
    lora_linears,
)
from rewardprop_fast.ops.packing import drop_packs, packed_bytes
from rewardprop_fast.ops.registry import Operator, backend, explain

#: Every operator by name: what ``rewardprop doctor`` lists and the tests go through.
OPERATORS: dict[str, Operator] = {
    op.name: op
    for op in (
        ATTENTION,
        FROZEN_CONV2D,
        FROZEN_LINEAR,
        FROZEN_UPSAMPLE_CONV2D,
        GEGLU,
        GROUP_NORM_SILU,
        GUIDED_DDIM_STEP,
        LORA_LINEAR,
    )
}

__all__ = [
    "OPERATORS",
    "Operator",
    "attention",
    "backend",
    "drop_packs",
    "explain",
    "frozen_conv2d",
    "frozen_linear",
    "frozen_upsample_conv2d",
    "geglu",
    "group_norm",
    "guided_ddim_step",
    "layer_norm_lora_linears",
    "lora_linear",
    "lora_linears",
    "packed_bytes",
]
