"""`accelerate` with a memory plan, for anybody's training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory import policy
from rewardprop_fast.memory.plan import Plan
from rewardprop_fast.nn import Report
from rewardprop_fast.nn import accelerate as swap
from rewardprop_fast.nn import restore as swap_back


def accelerate(
    model: Any,
    plan: Plan | str | Path | None = None,
    *,
    reward: object = None,
    offloader: policy.Offloads | None = None,
    verify: bool = False,
) -> Report:
    """Put the fast operators into a diffusers model, in place, and a memory plan to work on it.

    See `rewardprop_fast.nn.accelerate` for the operators. With a plan, the backward pass recomputes
    and offloads what the plan says, in whatever loop it runs; gradients are bitwise the same.

    Args:
        model: a pipeline, of which the UNet and the VAE are taken; without a plan, any module.
        plan: a `Plan` or its file, from `rewardprop plan --output plan.json`.
        reward: the reward's module, where the plan has rules for it.
        offloader: a `memory.Offloader`, where the plan offloads.
        verify: compare all that is recomputed with its first run, and name the first operation that
            gave other values; slow, for finding out why gradients differ.

    Returns:
        What was swapped and what was left, and why.

    Raises:
        ModelError: ``model`` is neither a module nor has a UNet or VAE.
        ConfigError: the plan is none, names what is not there, moves weights by phase (which needs
            the trainer), or offloads without an offloader.
    """
    report = swap(model)
    if plan is None:
        return report
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    if plan.residency == "phases":
        raise ConfigError(
            "The plan moves weights by phase, and phases are known to this library's trainer "
            "alone. In a loop of your own use memory.residency.Residency, or make a plan with "
            "--residency all."
        )
    unet, vae = getattr(model, "unet", None), getattr(model, "vae", None)
    if not isinstance(unet, nn.Module) or not isinstance(vae, nn.Module):
        raise ConfigError(
            f"A plan needs a pipeline with a UNet and a VAE; {type(model).__name__} is none."
        )
    _remove_plan(model)
    policy.apply(plan, unet, vae, reward, offloader=offloader, verify=verify)
    return report


def restore(model: Any) -> int:
    """Undo `accelerate`: original classes, packed weights freed, no plan at work.

    Returns:
        The number of modules whose class was changed back.

    Raises:
        ModelError: as in `accelerate`.
    """
    _remove_plan(model)
    return swap_back(model)


def _remove_plan(model: Any) -> None:
    parts = [model, getattr(model, "unet", None), getattr(model, "vae", None)]
    for root in parts:
        if not isinstance(root, nn.Module):
            continue
        for module in root.modules():
            for found in list(vars(module).values()):
                if isinstance(found, policy.Runner):
                    found.applied.remove()
