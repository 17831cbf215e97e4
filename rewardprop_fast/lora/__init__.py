"""LoRA adapters on a UNet: attach, train, switch, and exchange with other programs."""

from __future__ import annotations

from rewardprop_fast.lora.annealed import Annealed
from rewardprop_fast.lora.export import save_diffusers, save_kohya, save_lora
from rewardprop_fast.lora.inject import (
    disabled,
    inject,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    set_strength,
)
from rewardprop_fast.lora.mix import Compression, compress, mix
from rewardprop_fast.lora.reading import fill, load, put, read, read_metadata
from rewardprop_fast.lora.targets import PRESETS

__all__ = [
    "PRESETS",
    "Annealed",
    "Compression",
    "compress",
    "disabled",
    "fill",
    "inject",
    "load",
    "load_lora_state_dict",
    "lora_parameters",
    "lora_state_dict",
    "mix",
    "put",
    "read",
    "read_metadata",
    "save_diffusers",
    "save_kohya",
    "save_lora",
    "set_strength",
]
