"""The operators as modules, and the call that puts them into diffusers models."""

from __future__ import annotations

from rewardprop_fast.nn.merged import merged_lora
from rewardprop_fast.nn.swap import Report, accelerate, restore

__all__ = ["Report", "accelerate", "merged_lora", "restore"]
