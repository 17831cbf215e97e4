"""What a plan has to keep to, and what it may do for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rewardprop_fast.memory.devices import Device

Residency = Literal["all", "phases"]


@dataclass(frozen=True)
class Limits:
    """What the plan is for.

    Attributes:
        budget: bytes, None for no limit.
        to_host, to_device: bytes per second between the device and host memory.
        offload: whether inputs of recomputed units may go to host memory.
        residencies: which of "all" and "phases" may be taken.
        slack: share of the budget that is left free, for what a sum of parts may be short by.
        apart: whether the device has memory of its own, so that moving to the host could help.
    """

    budget: int | None
    to_host: float = 20e9
    to_device: float = 20e9
    offload: bool = False
    residencies: tuple[Residency, ...] = ("all",)
    slack: float = 0.0
    apart: bool = True


def limits_on(
    device: Device,
    budget: int | None,
    offload: bool = True,
    residencies: tuple[Residency, ...] = ("all", "phases"),
) -> Limits:
    """What a plan may do on a device; on a CPU, whose memory is the host's, it moves nothing."""
    if not device.arch:
        return Limits(budget, apart=False)
    return Limits(budget, device.download, device.upload, offload, residencies)
