"""What each part of a step costs in bytes and seconds, under each policy it may have.

A step runs a few times on fake tensors under a tracker. At the borders of every unit (a resnet, a
transformer block, a block of the decoder or of the reward) the live bytes are noted, and the most
between two borders. From the first run, in which everything is kept, comes the skeleton: what is
alive at every border beside what the units keep. In the others the units take turns with their
modes, so that each mode of each kind of unit is seen at least once.

The bytes alive at a border are then the skeleton's and, for every unit between its forward and its
backward, what it keeps under its mode: a sum, which the planner can minimise over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from rewardprop_fast.memory.kinds import (
    ATTENTION,
    DECODER_BLOCK,
    FEED_FORWARD,
    RESNET,
    REWARD_BLOCK,
    TRANSFORMER_BLOCK,
)
from rewardprop_fast.memory.plan import Plan, Policy

_R = Policy.RECOMPUTE

#: What may be chosen for a unit: kinds of the segments in it, and their policy. Dearer ones last.
MODES: Mapping[str, Mapping[str, Mapping[str, Policy]]] = {
    TRANSFORMER_BLOCK: {
        "keep": {},
        "feed-forward": {FEED_FORWARD: _R},
        "parts": {FEED_FORWARD: _R, ATTENTION: _R},
        "block": {TRANSFORMER_BLOCK: _R},
    },
    RESNET: {"keep": {}, "block": {RESNET: _R}},
    DECODER_BLOCK: {
        "keep": {},
        "parts": {RESNET: _R, ATTENTION: _R},
        "block": {DECODER_BLOCK: _R, RESNET: _R, ATTENTION: _R},
    },
    REWARD_BLOCK: {"keep": {}, "block": {REWARD_BLOCK: _R}},
}

#: Phases that need the UNet's weights, and those that need the decoder's and the reward's.
CHAIN_PHASES = ("prefix", "suffix", "backward")
TAIL_PHASES = ("decode", "reward", "decode_backward")

#: The phase whose beginning is that of a chain of steps with gradients.
CHAIN_BEGINS = "suffix"

#: The phase of the optimizer, when all gradients are there.
UPDATE = "update"

#: Steps of intervals outside the chain of the K steps: before it, behind it, behind its gradients.
BEFORE, BEHIND, AFTER = -1, -2, -3


@dataclass(frozen=True)
class Numbers:
    """A unit under one mode. Bytes are beside what was alive before it ran.

    Attributes:
        kept: between its forward and its backward.
        forward, backward: most during it, the gradient of its output included.
        forward_seconds, backward_seconds: modelled.
        inputs: bytes of the first tensor it was called on, which a recomputed unit holds.
        held: bytes of each tensor it was called on that was there still when its backward pass
            began, 0 of the others.
    """

    kept: int
    forward: int
    backward: int
    forward_seconds: float
    backward_seconds: float
    inputs: int
    held: tuple[int, ...] = ()


@dataclass(frozen=True)
class Unit:
    """A part of the step for which one mode is chosen.

    Attributes:
        name: its outermost segment's; step: of the K (or 0), in the order they run.
        signature: units with equal ones have equal numbers.
        parts: the kinds of the segments within it.
    """

    name: str
    kind: str
    step: int
    signature: str
    parts: frozenset[str]


@dataclass(frozen=True)
class Interval:
    """A stretch of the step between two borders.

    Attributes:
        phase: "prefix", "suffix", "decode", "reward", "decode_backward" (of the reward and the
            decoder), "backward" (of the chain), "update".
        step: of the K; `BEFORE` the first, `BEHIND` the last, or `AFTER` the gradients.
        unit: index of the unit that runs, or -1 for what lies between.
        is_backward: whether the unit's backward pass runs.
        opened: units 0..opened-1 have run forward and not yet backward (beside the running one).
        skeleton: bytes alive at its start, without what units keep.
        extra: most bytes beside that, for stretches without a unit.
        seconds: modelled, everything kept.
        gradients: bytes of the skeleton that are gradients of trained parameters.
    """

    phase: str
    step: int
    unit: int
    is_backward: bool
    opened: int
    skeleton: int
    extra: int
    seconds: float = 0.0
    gradients: int = 0


@dataclass
class Profile:
    """A whole step: its intervals in order, and what the units' modes cost.

    Attributes:
        gradient_steps: how many of the K steps it holds: at most two.
        numbers: signature -> mode -> numbers.
        seconds: modelled, of all operations by phase, with everything kept.
        step_starts, step_ends: skeleton before and behind the UNet's call in each step.
        prefix_seconds: of one UNet call without gradients.
        weights: bytes of the frozen weights of "unet", "vae" and "reward".
        trained: bytes of the trained parameters, and so of their gradients.
        step_input: bytes of what the UNet is called on in one step with gradients alone, which
            recomputing the whole step keeps; step_output: of what it returns.
        shared_input: bytes of what it is called on in every step, or in the only one, as far as
            nobody holds it by the chain's backward pass unless something is recomputed.
        images: bytes of what is there when the chain's backward pass begins, and was not when the
            chain had run: images, rewards, their gradients.
        resident: bytes alive all the time, weights included.
        workspace: most bytes that an operation of the library uses for itself, if it was asked.
    """

    gradient_steps: int
    units: list[Unit] = field(default_factory=list)
    intervals: list[Interval] = field(default_factory=list)
    numbers: dict[str, dict[str, Numbers]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    step_starts: list[int] = field(default_factory=list)
    step_ends: list[int] = field(default_factory=list)
    prefix_seconds: float = 0.0
    weights: dict[str, int] = field(default_factory=dict)
    trained: int = 0
    step_input: int = 0
    shared_input: int = 0
    step_output: int = 0
    images: int = 0
    resident: int = 0
    workspace: int = 0


def absent(plan: Plan, unet: nn.Module, vae: nn.Module, reward: object) -> dict[str, int]:
    """Phase -> bytes of weights that are not on the device in it, under a plan."""
    if plan.residency == "all":
        return {}
    chain, tail = frozen_bytes(unet), frozen_bytes(vae) + frozen_bytes(reward)
    phases = (*CHAIN_PHASES, *TAIL_PHASES, UPDATE)
    return {name: chain if name in TAIL_PHASES else tail for name in phases}


def frozen_bytes(network: object) -> int:
    if not isinstance(network, nn.Module):
        return 0
    held = [p for p in network.parameters() if not p.requires_grad]
    return bytes_of([*held, *network.buffers()])


def bytes_of(tensors: list[Tensor], but: list[Tensor] | None = None) -> int:
    """Of their storages, each once, without those of other tensors."""
    known = {tensor.untyped_storage()._cdata for tensor in but or ()}
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            total += storage.nbytes()
    return total
