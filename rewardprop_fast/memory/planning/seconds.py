"""Modelled seconds of a whole step, as far as they do not depend on the units' modes."""

from __future__ import annotations

from rewardprop_fast.memory.planning.limits import Limits, Residency
from rewardprop_fast.memory.profile import TAIL_PHASES, UPDATE, Profile


def base_seconds(profile: Profile, gradient_steps: int, prefix: int) -> float:
    """Of the whole step, everything kept."""
    seconds = profile.seconds
    chain = seconds.get("suffix", 0.0) + seconds.get("backward", 0.0)
    once = sum(seconds.get(name, 0.0) for name in (*TAIL_PHASES, UPDATE))
    chain *= gradient_steps / profile.gradient_steps
    return prefix * profile.prefix_seconds + chain + once


def least_seconds(
    profile: Profile,
    gradient_steps: int,
    prefix: int,
    whole: int,
    residency: Residency,
    limits: Limits,
) -> float:
    """No choice with so many whole steps and this residency can be faster."""
    once = profile.seconds["suffix"] / profile.gradient_steps
    seconds = base_seconds(profile, gradient_steps, prefix) + whole * once
    if residency == "phases":
        seconds += sum(profile.weights.values()) / limits.to_device
    return seconds
