"""A trainer's `memory_budget`: from the setting to a plan, and the plan put to work."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory import Offloader, policy
from rewardprop_fast.memory.devices import Device, find_device
from rewardprop_fast.memory.plan import Plan
from rewardprop_fast.memory.planner import limits_on
from rewardprop_fast.memory.profile import CHAIN_BEGINS, CHAIN_PHASES, TAIL_PHASES
from rewardprop_fast.memory.residency import Residency
from rewardprop_fast.memory.scheduling import Backend
from rewardprop_fast.memory.sizes import format_bytes, parse_bytes
from rewardprop_fast.ops.packing import most_packed_bytes
from rewardprop_fast.rewards import Reward, name_of
from rewardprop_fast.rollout.graph import GraphBackend
from rewardprop_fast.training.capture import leaves_room
from rewardprop_fast.training.config import TrainConfig
from rewardprop_fast.training.dry_run import DryRun, gradient_steps_of
from rewardprop_fast.training.estimate import make_profile, make_room, plan_for

AUTO = "auto"

#: Left alone of a card's free memory: what the allocator loses between blocks, cuBLAS's and cuDNN's
#: workspaces. The context is not among what is free.
_RESERVE = 2**30

#: Host memory for what is offloaded, at most this share of what is free.
_HOST_SHARE = 0.5

#: The phases of a step in order, as far as the next one may need other weights.
_IN_ORDER = ("suffix", *TAIL_PHASES, "backward")

#: Which weights each phase of a step needs.
_PHASES = {
    **{name: {"unet"} for name in CHAIN_PHASES},
    **{name: {"vae", "reward"} for name in TAIL_PHASES},
}


def make(
    setting: str, pipe: Any, reward: Reward, config: TrainConfig, device: torch.device
) -> Plan:
    """The plan a setting asks for: read, or the fastest within a budget.

    Args:
        setting: "auto" for what is free on the device, a size ("24GiB"), or a plan's .json file.
        pipe: ready to train.

    Raises:
        ConfigError: the file is no plan, nothing fits, or the reward cannot run without values.
    """
    if setting.endswith(".json"):
        return Plan.load(setting)
    if setting == AUTO:
        budget = available(device, gradient_steps_of(config), pipe, reward)
    else:
        budget = parse_bytes(setting)
    card = _card(device) if device.type == "cuda" else find_device("cpu")
    try:
        dry = DryRun.of_pipeline(pipe, reward, replace(config, device=device.type))
        profiled = make_profile(dry, card)
    except (DataDependentOutputException, DynamicOutputShapeException, AssertionError) as error:
        raise ConfigError(
            f"The memory of this run cannot be foreseen, because the reward {name_of(reward)!r} "
            f"does not run on tensors without values: {error}. Give memory_budget a plan's file "
            "(`rewardprop plan --output plan.json`), or leave it out."
        ) from error
    return plan_for(dry, profiled, limits_on(card, budget)).plan


def available(device: torch.device, gradient_steps: int, *there: Any) -> int:
    """Bytes that tensors may take: what is free, and what is there already of ``there``.

    Args:
        gradient_steps: K.
        there: pipelines and modules.
    """
    taken = sum(_bytes(one) for one in there)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused + taken - _RESERVE
    # On a CPU the packed copies of frozen weights come on top.
    packed = sum(_packed(one, gradient_steps) for one in there)
    return free_host_memory() + taken - packed - _RESERVE


def free_host_memory() -> int:
    """Bytes of main memory that may be taken without swapping (Linux: MemAvailable)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        raise ConfigError(
            "How much memory is free cannot be found out here; give memory_budget as a size, such "
            "as 16GiB."
        ) from None
    found = next(line for line in lines if line.startswith("MemAvailable"))
    return int(found.split()[1]) * 1024


class Memory:
    """A plan at work on a pipeline and a reward.

    Attributes:
        plan: what decides.
        offloader: where the plan offloads.
    """

    def __init__(
        self,
        plan: Plan,
        pipe: Any,
        reward: Reward,
        backend: Backend | None = None,
        slab_bytes: int | None = None,
        graphs: GraphBackend | None = None,
    ) -> None:
        """Put ``plan`` to work.

        Args:
            backend: of whoever moves what the plan moves; None is the device's.
            slab_bytes: host memory for what is offloaded; None is half of what is free.
            graphs: whose memory is given back before gradients need it, where it is too much.

        Raises:
            ConfigError: the plan names what is not there, or moves what a CPU has in one place.
        """
        self.plan, self.graphs = plan, graphs
        moves = plan.offloads or plan.residency == "phases"
        if moves and backend is None:
            backend = _backend(pipe.unet.device)
        networks = {"unet": pipe.unet, "vae": pipe.vae, "reward": reward}
        modules = {name: m for name, m in networks.items() if isinstance(m, nn.Module)}
        self.residency: Residency | None = None
        if plan.residency == "phases":
            assert backend is not None
            phases = {name: needed & modules.keys() for name, needed in _PHASES.items()}
            self.residency = Residency(modules, phases, backend, plan.budget_bytes)
        self.offloader: Offloader | None = None
        if plan.offloads:
            assert backend is not None
            slab = int(_HOST_SHARE * free_host_memory()) if slab_bytes is None else slab_bytes
            self.offloader = Offloader(
                backend, slab, never=modules.values(), weights=self.residency
            )
        self.applied = policy.apply(plan, pipe.unet, pipe.vae, reward, offloader=self.offloader)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Surrounds a phase of a step: the weights it needs are on the device."""
        make_room(self.offloader, name)
        if name == CHAIN_BEGINS:
            if self.graphs is not None and not leaves_room(self.graphs, self.plan):
                self.graphs.drop()
            self.applied.begin()
        if self.residency is None:
            return nullcontext()
        return self.residency.phase(name, *self._ahead(name))

    def _ahead(self, name: str) -> tuple[str | None, int]:
        """The next phase, and the bytes that the plan leaves free in this one for its weights."""
        peaks = self.plan.prediction.get("peak_bytes_by_phase", {})
        if self.plan.budget_bytes is None or name not in peaks or name not in _IN_ORDER[:-1]:
            return None, 0
        following = _IN_ORDER[_IN_ORDER.index(name) + 1]
        return following, max(0, self.plan.budget_bytes - int(peaks[name]))

    def reset(self) -> None:
        """After a step that did not come to its end."""
        if self.offloader is not None:
            self.offloader.reset()

    def close(self) -> None:
        """Everything is as it was before."""
        self.reset()
        self.applied.remove()
        if self.residency is not None:
            self.residency.close()


def describe(plan: Plan) -> str:
    """One line on what a plan does."""
    parts = []
    for title, rules in (
        ("UNet", plan.steps[-1]),
        ("decoder", plan.decode),
        ("reward", plan.reward),
    ):
        kinds: dict[str, list[str]] = {}
        for key, chosen in rules.items():
            if "." not in key and chosen.value != "keep":
                kinds.setdefault(chosen.value, []).append(key)
        words = [f"{', '.join(names)}: {what}" for what, names in kinds.items()]
        parts.append(f"{title} {'; '.join(words) or 'kept'}")
    budget = "" if plan.budget_bytes is None else f" within {format_bytes(plan.budget_bytes)}"
    return f"Memory plan{budget}: {'. '.join(parts)}."


def _backend(device: torch.device) -> Backend:
    if device.type != "cuda":
        raise ConfigError(
            "The plan offloads or moves weights by phase, which on a CPU would copy memory to the "
            "same memory. Make a plan with --no-offload and --residency all, or train on a GPU."
        )
    from rewardprop_fast.memory.scheduling.cuda import Cuda

    return Cuda(device)


def _card(device: torch.device) -> Device:
    """The limits of the card that is there, or of a usual one."""
    name = torch.cuda.get_device_name(device)
    try:
        return find_device(name)
    except ValueError:
        return find_device("rtx3090")


def _bytes(one: Any) -> int:
    networks = (
        [one.unet, one.vae] if hasattr(one, "unet") else [one] if isinstance(one, nn.Module) else []
    )
    return sum(
        tensor.numel() * tensor.element_size()
        for network in networks
        for tensor in (*network.parameters(), *network.buffers())
    )


def _packed(one: Any, gradient_steps: int) -> int:
    networks = [one.unet, one.vae] if hasattr(one, "unet") else []
    return sum(
        most_packed_bytes(module.weight, gradient_steps)
        for network in networks
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    )
