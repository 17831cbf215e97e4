"""Where gradients flow: one method a file, each readable beside its paper."""

from __future__ import annotations

from rewardprop_fast.methods.alignprop import AlignProp
from rewardprop_fast.methods.base import Method, Rollout
from rewardprop_fast.methods.ddpo import DDPO
from rewardprop_fast.methods.draft import DRaFT
from rewardprop_fast.methods.draft_lv import DRaFTLV
from rewardprop_fast.methods.draft_plus import DRaFTPlus
from rewardprop_fast.methods.drtune import DRTune
from rewardprop_fast.methods.refl import ReFL
from rewardprop_fast.methods.srpo import SRPO

#: Every method by the name a config file uses.
METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (DRaFT, DRaFTLV, DRaFTPlus, AlignProp, ReFL, DRTune, SRPO, DDPO)
}

__all__ = [
    "DDPO",
    "METHODS",
    "SRPO",
    "AlignProp",
    "DRTune",
    "DRaFT",
    "DRaFTLV",
    "DRaFTPlus",
    "Method",
    "ReFL",
    "Rollout",
]
