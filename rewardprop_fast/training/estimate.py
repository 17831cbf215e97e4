"""Peak memory and modelled time of a training step, and the plan that fits it into a budget."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from torch import nn

from rewardprop_fast.memory import MemoryTracker, policy
from rewardprop_fast.memory.devices import Device
from rewardprop_fast.memory.measure import Holding
from rewardprop_fast.memory.offload import Offloader
from rewardprop_fast.memory.plan import Plan
from rewardprop_fast.memory.planner import Limits, Planned, Planner
from rewardprop_fast.memory.profile import CHAIN_BEGINS, TAIL_PHASES, Profile, absent
from rewardprop_fast.memory.profiling import Networks, profile
from rewardprop_fast.memory.residency import pieces_of
from rewardprop_fast.memory.scheduling.backend import COMPUTE
from rewardprop_fast.memory.scheduling.double import Double
from rewardprop_fast.training.dry_run import PREFIX, DryRun, gradient_steps_of

#: Name under which `Estimate.holdings` lists the trained parameters and the optimizer's state.
TRAINED = "trained"

#: Of a budget, left free: what a plan composed of parts may be short by.
_SLACK = 0.0015

#: Bytes; more than anybody has.
_ENDLESS = 2**50


@dataclass(frozen=True)
class Moment:
    """The end of one operation: what is alive before its inputs are let go of.

    Attributes:
        seconds: modelled, since the step's beginning.
        nbytes: alive.
        phase: of the step.
    """

    seconds: float
    nbytes: int
    phase: str


@dataclass(frozen=True)
class Estimate:
    """What a step holds under a plan.

    Attributes:
        peak: bytes alive at once, at most; by_phase: the same within each phase.
        resident: bytes alive all the time.
        holdings: what was alive at the peak, the largest first. `Holding.module` begins with the
            network, "unet", "vae" or "reward"; of parameters it is the network alone, or `TRAINED`.
        seconds: modelled, of the steps that were run, waiting for copies included.
        moments: bytes over the step, one entry an operation.
        events: for `memory.replay`; with weights by phase these come and go in pieces.
        workspace: most bytes that an operation of the library uses for itself, on ``device``.
    """

    peak: int
    by_phase: dict[str, int]
    resident: int
    holdings: list[Holding]
    seconds: float
    moments: list[Moment]
    events: list[tuple[int, int]]
    workspace: int


def estimate(
    dry: DryRun,
    plan: Plan,
    device: Device,
    gradient_steps: int | None = None,
    prefix: int = PREFIX,
    *,
    optimizer: bool = True,
) -> Estimate:
    """Run a step on fake tensors under ``plan``: the bytes are those of the real step.

    Args:
        gradient_steps: run so many of the K steps; None is all.
        prefix: run so many UNet calls without gradients at most; two already find what the first
            has left.
        optimizer: whether the step ends with an update, and its state is there as from the first
            one on, unless the config keeps it on the host.
    """
    engine, pipe = dry.engine, dry.engine.pipe
    networks = {"unet": pipe.unet, "vae": pipe.vae, "reward": engine.reward}
    modules = {name: part for name, part in networks.items() if isinstance(part, nn.Module)}
    meter = dry.meter(device)
    moments: list[Moment] = []
    double = Double(_ENDLESS, _ENDLESS, device.download, device.upload, values=False)

    def see(func: Any, args: Any, kwargs: Any, output: Any) -> None:
        double.compute(meter.seconds(func, args, kwargs, output))
        phase = tracker.current_phase
        nbytes = tracker.live_bytes - away.get(phase, 0)
        moments.append(Moment(double.ready[COMPUTE], nbytes, phase))

    away = absent(plan, pipe.unet, pipe.vae, engine.reward)
    borders: list[tuple[int, str]] = []  # (events so far, phase that begins)
    tracker = MemoryTracker(nn.ModuleDict(modules), watch=see, fake=dry.mode)
    held = dry.resident(optimizer)  # by this name too: the optimizer's state is nowhere else
    tracker.count(dry.trained, TRAINED)
    for name, module in modules.items():
        tracker.count(module, name)
    tracker.count(held, TRAINED)
    resident = tracker.live_bytes
    offloader = Offloader(double, _ENDLESS, never=modules.values()) if plan.offloads else None
    applied = policy.apply(plan, pipe.unet, pipe.vae, engine.reward, offloader=offloader)

    def watch(phase: str) -> AbstractContextManager[None]:
        make_room(offloader, phase)
        if phase == CHAIN_BEGINS:
            applied.begin()
        borders.append((tracker.changes, phase))
        return tracker.phase(phase)

    engine.watch = watch
    try:
        with tracker:
            dry.step(gradient_steps, prefix, update=optimizer)
    finally:
        applied.remove()
    by_phase = {
        name: peak - away.get(name, 0) for name, peak in tracker.peak_by_phase.items() if name
    }
    events = tracker.events()
    if plan.residency == "phases":
        weights = set().union(*(tracker.counted_as(name) for name in modules))
        events = _by_phase(events, weights, borders, pieces_of(modules))
    highest = max(by_phase, key=by_phase.__getitem__)
    elsewhere = absent_networks(highest, plan.residency)
    return Estimate(
        by_phase[highest],
        by_phase,
        resident,
        [
            holding
            for holding in tracker.alive_at_peak(highest)
            if holding.operator != "given" or holding.module not in elsewhere
        ],
        double.ready[COMPUTE],
        moments,
        events,
        meter.workspace,
    )


def _by_phase(
    events: list[tuple[int, int]],
    weights: set[int],
    borders: list[tuple[int, str]],
    pieces: list[tuple[frozenset[str], int]],
) -> list[tuple[int, int]]:
    """The events of a step whose weights come and go with its phases, instead of being there."""
    found: list[tuple[int, int]] = []
    names = count(1 + max((which for which, _ in events), default=0))
    there: dict[int, int] = {}  # piece -> its name among the events

    def enter(phase: str) -> None:
        away = absent_networks(phase, "phases")
        for number, (owners, nbytes) in enumerate(pieces):
            if owners <= away and number in there:
                found.append((there.pop(number), -nbytes))
        for number, (owners, nbytes) in enumerate(pieces):
            if not owners <= away and number not in there:
                there[number] = next(names)
                found.append((there[number], nbytes))

    begun = 0
    for end, phase in [*borders, (len(events), "")]:
        found += [event for event in events[begun:end] if event[0] not in weights]
        if phase:
            enter(phase)
        begun = end
    return found


def absent_networks(phase: str, residency: str) -> set[str]:
    """Networks whose frozen weights are not on the device in a phase."""
    if residency == "all":
        return set()
    return {"unet"} if phase in TAIL_PHASES else {"vae", "reward"}


def make_room(offloader: Offloader | None, phase: str) -> None:
    """Before a phase: what the chain sent to the host leaves before the decoder begins."""
    if offloader is not None and phase == TAIL_PHASES[0]:
        offloader.flush()


def make_profile(dry: DryRun, device: Device) -> Profile:
    """What every part of the step costs in bytes and, on ``device``, seconds."""
    engine, meter = dry.engine, dry.meter(device)

    def step(k: int, prefix: int, watch: Callable[[str], AbstractContextManager[None]]) -> None:
        engine.watch = watch
        dry.step(k, prefix, update=prefix > 0)  # no choice changes it, as it does not the prefix

    found = profile(
        Networks(engine.pipe.unet, engine.pipe.vae, engine.reward, dry.mode),
        step,
        dry.resident(),
        gradient_steps_of(dry.config),
        meter.seconds,
    )
    found.workspace = meter.workspace
    return found


def planner_for(dry: DryRun, profiled: Profile, limits: Limits) -> Planner:
    """What plans this step, for any budget."""
    config = dry.config
    k = gradient_steps_of(config)
    prefix = config.method.plain_steps(config.sampling.steps)
    return Planner(profiled, k, prefix, replace(limits, slack=_SLACK))


def plan_for(dry: DryRun, profiled: Profile, limits: Limits) -> Planned:
    """The fastest plan within ``limits`` for this step. Raises BudgetError."""
    planned = planner_for(dry, profiled, limits).plan(limits.budget)
    plan = replace(planned.plan, made_for=made_for(dry), prediction=prediction(planned))
    return replace(planned, plan=plan)


def made_for(dry: DryRun) -> dict[str, Any]:
    """The step that a plan is for, as data."""
    config, engine = dry.config, dry.engine
    return {
        "method": config.method.name,
        "height": engine.height,
        "width": engine.width,
        "k": gradient_steps_of(config),
        "steps": config.sampling.steps,
        "guidance_scale": config.sampling.guidance_scale,
        "batch_size": config.batch_size,
        "rank": config.lora.rank,
        "dtype": str(engine.pipe.unet.dtype).removeprefix("torch."),
        "accelerate": config.accelerate,
    }


def prediction(planned: Planned, exact: Estimate | None = None) -> dict[str, Any]:
    """What is expected of a plan, as data: composed from parts, or as an exact run found it."""
    found = planned if exact is None else exact
    return {
        "peak_bytes": found.peak,
        "peak_is": "composed" if exact is None else "exact",
        "peak_bytes_by_phase": found.by_phase,
        "offloaded_bytes": planned.offloaded,
        "modelled_seconds": planned.seconds,
        "modelled_seconds_unlimited": planned.unlimited_seconds,
    }
