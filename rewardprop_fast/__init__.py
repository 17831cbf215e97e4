"""Fast, small-memory fine-tuning of diffusion models by reward back-propagation.

import rewardprop_fast as rpf

trainer = rpf.RewardPropTrainer(pipe, reward=rpf.rewards.StyleReward("fluent"), prompts="animals")
trainer.train()
trainer.save_lora("out")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rewardprop_fast.version import __version__

if TYPE_CHECKING:
    from rewardprop_fast import lora, memory, methods, models, nn, ops, presets, rewards, rollout
    from rewardprop_fast.memory.dropin import accelerate, restore
    from rewardprop_fast.methods import (
        DDPO,
        SRPO,
        AlignProp,
        DRaFT,
        DRaFTLV,
        DRaFTPlus,
        DRTune,
        ReFL,
    )
    from rewardprop_fast.training.config import (
        EarlyStoppingConfig,
        LoRAConfig,
        OptimizerConfig,
        OutputConfig,
        RegularisationConfig,
        RunConfig,
        SamplingConfig,
        TrainConfig,
    )
    from rewardprop_fast.training.trainer import RewardPropTrainer

_CONFIG = "rewardprop_fast.training.config"
# Name -> module, imported on first use: `rewardprop --help` must not wait for diffusers.
_HOMES = {
    "AlignProp": "rewardprop_fast.methods",
    "DDPO": "rewardprop_fast.methods",
    "DRaFT": "rewardprop_fast.methods",
    "DRaFTLV": "rewardprop_fast.methods",
    "DRaFTPlus": "rewardprop_fast.methods",
    "DRTune": "rewardprop_fast.methods",
    "ReFL": "rewardprop_fast.methods",
    "SRPO": "rewardprop_fast.methods",
    "EarlyStoppingConfig": _CONFIG,
    "LoRAConfig": _CONFIG,
    "OptimizerConfig": _CONFIG,
    "OutputConfig": _CONFIG,
    "RegularisationConfig": _CONFIG,
    "RunConfig": _CONFIG,
    "SamplingConfig": _CONFIG,
    "TrainConfig": _CONFIG,
    "RewardPropTrainer": "rewardprop_fast.training.trainer",
    "accelerate": "rewardprop_fast.memory.dropin",
    "restore": "rewardprop_fast.memory.dropin",
}
_ROOMS = ("lora", "memory", "methods", "models", "nn", "ops", "presets", "rewards", "rollout")

__all__ = [
    "DDPO",
    "SRPO",
    "AlignProp",
    "DRTune",
    "DRaFT",
    "DRaFTLV",
    "DRaFTPlus",
    "EarlyStoppingConfig",
    "LoRAConfig",
    "OptimizerConfig",
    "OutputConfig",
    "ReFL",
    "RegularisationConfig",
    "RewardPropTrainer",
    "RunConfig",
    "SamplingConfig",
    "TrainConfig",
    "__version__",
    "accelerate",
    "lora",
    "memory",
    "methods",
    "models",
    "nn",
    "ops",
    "presets",
    "restore",
    "rewards",
    "rollout",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"rewardprop_fast.{name}")
    raise AttributeError(f"module 'rewardprop_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
