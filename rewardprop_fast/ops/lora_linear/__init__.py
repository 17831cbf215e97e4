"""A frozen linear layer with a low-rank correction, or several of them on one input."""

from __future__ import annotations

from rewardprop_fast.ops.lora_linear.op import LORA_LINEAR, lora_linear, lora_linears

__all__ = ["LORA_LINEAR", "lora_linear", "lora_linears"]
