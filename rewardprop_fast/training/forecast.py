"""Will it fit? The plan of a step for a budget, what it holds when, and what other budgets cost.

The plan's figures are composed from those of the step's parts (`memory.planner`). Where that is
affordable the planned step is then run on fake tensors as a whole, which is exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rewardprop_fast.memory import Reserved, replay
from rewardprop_fast.memory.devices import Device
from rewardprop_fast.memory.measure import Holding
from rewardprop_fast.memory.planner import BudgetError, Limits, Planned, Planner
from rewardprop_fast.memory.profile import Profile
from rewardprop_fast.training.dry_run import DryRun, gradient_steps_of
from rewardprop_fast.training.estimate import (
    TRAINED,
    Estimate,
    absent_networks,
    estimate,
    make_profile,
    planner_for,
)

#: Of a card's memory: for the driver's context (0.3 to 0.5 GiB), the workspaces of its libraries
#: and what lies idle between the allocator's blocks. An assumption; nothing was run on a GPU.
RESERVE = 3 * 2**29

#: Steps with gradients up to which a planned step is run as a whole without being asked.
EXACT_STEPS = 3


@dataclass(frozen=True)
class Alternative:
    """Another budget.

    Attributes:
        budget: bytes.
        seconds: modelled, of the step; None where no plan fits.
        peak: bytes; of the least that works where no plan fits.
        residency: of the plan; "" where none fits.
    """

    budget: int
    seconds: float | None
    peak: int
    residency: str


@dataclass(frozen=True)
class Forecast:
    """The answer.

    Attributes:
        planned: the plan, its modelled time and its peak as composed from parts.
        exact: of the planned step run as a whole on fake tensors; None where that was left out.
        reserved: what the caching allocator would take for it, where ``exact`` is there.
        workspace: most bytes that an operation of the library uses for itself.
        holders: who holds what at the peak, (name for people, bytes), the largest first.
        timeline: (seconds, bytes, phase) over the step, in which of the steps without gradients two
            are shown.
        alternatives: what other budgets would cost.
    """

    planned: Planned
    exact: Estimate | None
    reserved: Reserved | None
    workspace: int
    holders: list[tuple[str, int]]
    timeline: list[tuple[float, int, str]]
    alternatives: list[Alternative]

    @property
    def peak(self) -> int:
        """Bytes allocated at once, at most."""
        return self.planned.peak if self.exact is None else self.exact.peak

    @property
    def by_phase(self) -> dict[str, int]:
        """The same within each phase."""
        return self.planned.by_phase if self.exact is None else self.exact.by_phase


def forecast(
    dry: DryRun,
    device: Device,
    limits: Limits,
    others: Sequence[int] = (),
    *,
    exact: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Forecast:
    """Plan a step and say what it takes.

    Args:
        dry: the step.
        device: whose times are modelled.
        limits: the budget, and what the plan may do to keep to it.
        others: budgets to compare with, bytes.
        exact: run the planned step as a whole whatever K is.
        say: is told what is being done, a line at a time.

    Raises:
        BudgetError: no plan fits; it says which budget would do and what would lower it.
    """
    k = gradient_steps_of(dry.config)
    say("Running the step's parts on fake tensors ...")
    profiled = make_profile(dry, device)
    say("Planning ...")
    planner = planner_for(dry, profiled, limits)
    planned = planner.plan(limits.budget)
    found = None
    if exact or k <= EXACT_STEPS:
        say("Running the planned step on fake tensors ...")
        found = estimate(dry, planned.plan, device)
    say("Trying other budgets ...")
    alternatives = [_alternative(planner, budget) for budget in others]
    return Forecast(
        planned,
        found,
        None if found is None else replay(found.events),
        profiled.workspace if found is None else found.workspace,
        _composed_holders(planned, profiled) if found is None else _holders(found.holdings),
        composed_timeline(planned) if found is None else timeline(found),
        alternatives,
    )


def _alternative(planner: Planner, budget: int) -> Alternative:
    try:
        planned = planner.plan(budget)
    except BudgetError as error:
        return Alternative(budget, None, error.least, "")
    return Alternative(budget, planned.seconds, planned.peak, planned.plan.residency)


# --- who holds what ---

_NETWORKS = {"unet": "UNet", "vae": "decoder", "reward": "reward"}

#: Parts of modules' names -> what they are for people; the first that is there counts.
_KINDS = {
    "unet": {
        ".ff": "feed-forward",
        ".attn": "attention",
        ".transformer_blocks": "transformer blocks' inputs and norms",
        ".attentions": "around transformer blocks",
        ".resnets": "resnets",
        ".upsamplers": "up- and downsampling",
        ".downsamplers": "up- and downsampling",
    },
    "vae": {
        ".attentions": "attention",
        ".resnets": "resnets",
        ".upsamplers": "upsampling",
        "": "blocks",
    },
    "reward": {
        ".mlp": "feed-forward",
        ".self_attn": "attention",
        "": "blocks",
    },
}


def kind_of(holding: Holding) -> str:
    """Who holds it, for people: "UNet: feed-forward"."""
    network, _, path = holding.module.partition(".")
    if holding.operator == "given" and network == TRAINED:
        return "LoRA and optimizer"
    title = _NETWORKS.get(network)
    if title is None:
        return "gradients" if "backward" in holding.phase else "latents, images, conditions"
    if holding.operator == "given":
        return f"{'VAE' if network == 'vae' else title}: weights"
    kinds = _KINDS[network]
    kind = next((kinds[part] for part in kinds if part in f".{path}"), "rest")
    again = " (again)" if "backward" in holding.phase else ""
    return f"{title}: {kind}{again}"


def _holders(holdings: Sequence[Holding]) -> list[tuple[str, int]]:
    totals: Counter[str] = Counter()
    for holding in holdings:
        totals[kind_of(holding)] += holding.nbytes
    return totals.most_common()


def _composed_holders(planned: Planned, profiled: Profile) -> list[tuple[str, int]]:
    peak_phase = max(planned.by_phase, key=planned.by_phase.__getitem__)
    weights = profiled.weights
    away = absent_networks(peak_phase, planned.plan.residency)
    found = {
        f"{'VAE' if name == 'vae' else _NETWORKS[name]}: weights": nbytes
        for name, nbytes in weights.items()
        if name not in away and nbytes
    }
    found["LoRA and optimizer"] = profiled.resident - sum(weights.values())
    rest = planned.at_peak.get("", 0) - sum(found.values())
    found |= {f"{kind}s": nbytes for kind, nbytes in planned.at_peak.items() if kind}
    found["in between: latents, images, gradients"] = rest
    return Counter(found).most_common()


# --- over the step ---


def timeline(found: Estimate) -> list[tuple[float, int, str]]:
    """(seconds, bytes, phase) at the end of every operation of a run."""
    return [(moment.seconds, moment.nbytes, moment.phase) for moment in found.moments]


def composed_timeline(planned: Planned) -> list[tuple[float, int, str]]:
    """(seconds, most bytes, phase) of every interval of a plan, from its parts."""
    seconds, points = 0.0, []
    for phase, nbytes, interval in planned.timeline():
        seconds += interval
        points.append((seconds, nbytes, phase))
    return points
