"""A frozen linear layer with a low-rank correction, or several of them on one input."""

from __future__ import annotations

from rewardprop_fast.ops.lora_linear.normed import layer_norm_lora_linears
from rewardprop_fast.ops.lora_linear.op import LORA_LINEAR, lora_linear, lora_linears

__all__ = ["LORA_LINEAR", "layer_norm_lora_linears", "lora_linear", "lora_linears"]
