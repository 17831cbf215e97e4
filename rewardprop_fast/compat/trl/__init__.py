"""TRL 0.23.1's AlignProp interface, which TRL removed in 0.24, running on this library.

    from rewardprop_fast.compat.trl import (
        AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline,
    )

A script written for TRL changes that line. What is the same and what is not: docs/trl.md.
"""

from __future__ import annotations

from rewardprop_fast.compat.trl.config import AlignPropConfig
from rewardprop_fast.compat.trl.pipeline import DefaultDDPOStableDiffusionPipeline
from rewardprop_fast.compat.trl.trainer import AlignPropTrainer

__all__ = ["AlignPropConfig", "AlignPropTrainer", "DefaultDDPOStableDiffusionPipeline"]
