"""Rewards: what the images are trained towards. See docs/rewards.md for how to bring your own."""

from rewardprop_fast.rewards.base import (
    Reward,
    check,
    check_signature,
    evaluate,
    is_differentiable,
    name_of,
    prepare,
    probe,
)
from rewardprop_fast.rewards.brightness import BrightnessReward
from rewardprop_fast.rewards.colour import ColourReward
from rewardprop_fast.rewards.ensemble import Ensemble
from rewardprop_fast.rewards.jpeg import (
    DifferentiableJPEG,
    JPEGCompressibility,
    JPEGIncompressibility,
)
from rewardprop_fast.rewards.jpeg_size import JPEGSize
from rewardprop_fast.rewards.normalised import Normalised, measure
from rewardprop_fast.rewards.registry import REWARDS, build, build_all
from rewardprop_fast.rewards.symmetry import SymmetryReward

__all__ = [
    "REWARDS",
    "BrightnessReward",
    "ColourReward",
    "DifferentiableJPEG",
    "Ensemble",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "JPEGSize",
    "Normalised",
    "Reward",
    "SymmetryReward",
    "build",
    "build_all",
    "check",
    "check_signature",
    "evaluate",
    "is_differentiable",
    "measure",
    "name_of",
    "prepare",
    "probe",
]
