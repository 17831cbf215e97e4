"""The seconds of every operation of a run, and the largest workspace that one of them needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rewardprop_fast.memory.cost import cost_of
from rewardprop_fast.memory.devices import Device
from rewardprop_fast.memory.signature import signature
from rewardprop_fast.memory.workspace import Workspaces


class Meter:
    """To be told of every operation by whichever dispatch mode is running.

    A call that was seen before, in this run or another, is looked up under one key, its operation,
    shapes, strides and dtypes: neither its cost nor its workspace is worked out again.

    Args:
        device: whose seconds are modelled.

    Attributes:
        workspace: most bytes that an operation of the library used for itself, since `begin`.
    """

    def __init__(self, device: Device) -> None:
        self.device, self.workspace = device, 0
        self._workspaces = Workspaces(divmod(device.arch, 10)) if device.arch else Workspaces()
        self._known: dict[Any, tuple[float, int]] = {}

    def begin(self) -> None:
        """Another run."""
        self.workspace = 0

    def seconds(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> float:
        """Of one call, modelled; arguments as of `cost.cost_of`."""
        key = signature(func, args, kwargs)
        found = self._known.get(key)
        if found is None:
            seconds = self.device.seconds(cost_of(func, args, kwargs, output))
            found = seconds, self._workspaces.see(func, args, kwargs)
            if torch.Tag.dynamic_output_shape not in func.tags:
                self._known[key] = found
        self.workspace = max(self.workspace, found[1])
        return found[0]
