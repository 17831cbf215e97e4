"""Plans are the fastest there are within their budget: held against going through all of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewardprop_fast.memory.kinds import DECODER_BLOCK, RESNET, REWARD_BLOCK, TRANSFORMER_BLOCK
from rewardprop_fast.memory.plan import Policy, policy_for
from rewardprop_fast.memory.planner import BudgetError, Limits, Planner, make_plan
from rewardprop_fast.memory.planning.variables import groups_of
from rewardprop_fast.memory.profile import (
    BEFORE,
    BEHIND,
    MODES,
    Interval,
    Numbers,
    Profile,
    Unit,
)

MIB = 2**20
NAMES = {
    TRANSFORMER_BLOCK: "unet.block{}.transformer_blocks.0",
    RESNET: "unet.block{}.resnets.0",
    DECODER_BLOCK: "vae.decoder.up_blocks.{}",
    REWARD_BLOCK: "reward.layers.{}",
}
PARTS = {
    TRANSFORMER_BLOCK: frozenset({"feed-forward", "attention"}),
    DECODER_BLOCK: frozenset({"resnet"}),
}


@st.composite
def numbers(draw: Any, kind: str) -> dict[str, Numbers]:
    """Modes in which less is kept and more time is taken, as it is."""
    size = st.integers(1, 40)
    kept = sorted((draw(size) for _ in MODES[kind]), reverse=True)
    kept[-1] = 0
    seconds = sorted(draw(st.integers(1, 50)) for _ in MODES[kind])
    return {
        mode: Numbers(
            kept[i] * MIB,
            (kept[i] + draw(size)) * MIB,
            (kept[i] + draw(size)) * MIB,
            1.0,
            float(seconds[i]),
            draw(size) * MIB,
        )
        for i, mode in enumerate(MODES[kind])
    }


@st.composite
def profiles(draw: Any, steps: int) -> Profile:
    """Of a chain with one or two units in each step, one unit in the decoder, one in the reward."""
    kinds = draw(st.lists(st.sampled_from([TRANSFORMER_BLOCK, RESNET]), min_size=1, max_size=2))
    found = Profile(
        steps,
        seconds={"suffix": 10.0 * steps, "backward": 12.0 * steps, "decode": 5.0},
        prefix_seconds=10.0,
        weights={"unet": 60 * MIB, "vae": 10 * MIB, "reward": 20 * MIB},
        trained=2 * MIB,
        step_input=draw(st.integers(0, 3)) * MIB,
        step_output=MIB,
        images=draw(st.integers(0, 3)) * MIB,
    )
    for step in range(steps):
        for number, kind in enumerate(kinds):
            name = NAMES[kind].format(number)
            found.units.append(
                Unit(name, kind, step, f"{name} {min(step, 1)}", PARTS.get(kind, frozenset()))
            )
    for kind in (DECODER_BLOCK, REWARD_BLOCK):
        name = NAMES[kind].format(0)
        found.units.append(Unit(name, kind, 0, name, PARTS.get(kind, frozenset())))
    for unit in found.units:
        found.numbers.setdefault(unit.signature, draw(numbers(unit.kind)))
    glue, latents = draw(st.integers(0, 8)) * MIB, draw(st.integers(0, 2)) * MIB
    base = sum(found.weights.values())
    chain = [i for i, unit in enumerate(found.units) if unit.name.startswith("unet.")]
    tail = [i for i in range(len(found.units)) if i not in chain]
    live = base
    found.intervals.append(Interval("prefix", BEFORE, -1, False, 0, base, 5 * MIB))
    for index in chain:
        step = found.units[index].step
        if index == chain[0] or found.units[index - 1].step != step:
            found.step_starts.append(live)
        found.intervals.append(Interval("suffix", step, index, False, index, live, 0))
        found.intervals.append(Interval("suffix", step, -1, False, index + 1, live, 3 * MIB))
        if index == chain[-1] or found.units[index + 1].step != step:
            found.step_ends.append(live + glue + found.step_output)
            live += glue + latents
    for index, phase in zip(tail, ("decode", "reward"), strict=True):
        found.intervals.append(Interval(phase, BEHIND, index, False, index, live, 0))
    for index in reversed(tail):
        found.intervals.append(Interval("decode_backward", BEHIND, index, True, index, live, 0))
    for index in reversed(chain):
        step = found.units[index].step
        made = 0 if step < steps - 1 else MIB  # gradients of this step so far
        before = base + (glue + latents) * step + (found.trained if step < steps - 1 else made)
        found.intervals.append(
            Interval("backward", step, index, True, index, before, 0, gradients=made)
        )
    return found


def every_choice(profile: Profile, k: int) -> Iterator[tuple[float, int]]:
    """(extra seconds, peak) of each, by walking through the step; no sum is the planner's."""
    chain = [u for u in profile.units if u.name.startswith("unet.")]
    tail = [u for u in profile.units if u not in chain]
    per_step = [[u for u in chain if u.step == min(step, 1)] for step in range(k)]
    units = [unit for step in per_step for unit in step] + tail
    wholes = [0, *(group.stop for group in groups_of(k))]
    for whole in wholes:
        for modes in product(*(MODES[unit.kind] for unit in units)):
            chosen = [profile.numbers[u.signature][m] for u, m in zip(units, modes, strict=True)]
            extra = 10.0 * whole
            for unit, numbers in zip(units, chosen, strict=True):
                keep = profile.numbers[unit.signature]["keep"]
                extra += numbers.backward_seconds - keep.backward_seconds
            yield extra, _peak(profile, per_step, tail, chosen, whole, k)


def _peak(profile: Profile, per_step: Any, tail: Any, chosen: Any, whole: int, k: int) -> int:
    base, trained, own = sum(profile.weights.values()), profile.trained, profile.step_input
    glue = profile.step_ends[0] - base - profile.step_output
    tails = [i for i in profile.intervals if i.phase == "decode"]
    latents = (tails[0].skeleton - base) // profile.gradient_steps - glue
    numbers = iter(chosen)
    steps = [[next(numbers) for _ in step] for step in per_step]
    ends = [next(numbers) for _ in tail]
    # two latents of float32 at most as large as the step's output each, bfloat16
    peak, live = base + 5 * MIB + 2 * profile.step_output, base
    held = []  # live before each step

    def forward(step: list[Numbers], live: int, keeps: bool) -> int:
        nonlocal peak
        for one in step:
            peak = max(peak, live + one.forward)
            live += one.kept if keeps else 0
            peak = max(peak, live + 3 * MIB)
        return live

    for index, step in enumerate(steps):
        held.append(live)
        after = forward(step, live, index >= whole)
        live = after + glue if index >= whole else live + own
        live += latents
    for one in ends:
        peak = max(peak, live + one.forward)
        live += one.kept
    for one in reversed(ends):
        live -= one.kept
        peak = max(peak, live + one.backward)
    for index in reversed(range(k)):
        made = trained if index < k - 1 else 0
        if index < whole:
            around = profile.images + 5 * profile.step_output
            forward(steps[index], held[index] + made + around, True)
        live = held[index] + (made or MIB) + (own if index < whole else 0)
        live += sum(one.kept for one in steps[index])
        for one in reversed(steps[index]):
            live -= one.kept
            peak = max(peak, live + one.backward)
    return peak


def least_peak(profile: Profile, k: int, limits: Limits) -> int:
    return Planner(profile, k, 10, limits).least()


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_choice_within_the_budget_is_faster(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 2))
    profile = data.draw(profiles(k))
    choices = list(every_choice(profile, k))
    peaks = sorted({peak for _, peak in choices})
    budget = data.draw(st.sampled_from(peaks)) + MIB // 4
    planned = make_plan(profile, k, 10, Limits(budget), gap=0.0)
    best = min(extra for extra, peak in choices if peak <= budget)
    assert planned.seconds - planned.unlimited_seconds == pytest.approx(best, abs=1e-6)
    assert planned.peak <= budget
    assert any(abs(extra - best) < 1e-6 and peak == planned.peak for extra, peak in choices)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_the_least_budget_is_told_and_is_the_least(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 2))
    profile = data.draw(profiles(k))
    least = min(peak for _, peak in every_choice(profile, k))
    assert least_peak(profile, k, Limits(None)) == pytest.approx(least, abs=MIB // 100)
    with pytest.raises(BudgetError, match="the least that works is") as caught:
        make_plan(profile, k, 10, Limits(least - MIB))
    assert caught.value.least == pytest.approx(least, abs=MIB // 100)
    assert make_plan(profile, k, 10, Limits(caught.value.least + MIB // 100)).peak <= least + MIB


def simple(k: int) -> Profile:
    """Two like transformer blocks a step, a decoder block; 40 MiB kept, 4 under "parts"."""
    found = Profile(
        min(k, 2),
        seconds={"suffix": 10.0 * min(k, 2), "backward": 12.0 * min(k, 2), "decode": 5.0},
        prefix_seconds=10.0,
        weights={"unet": 100 * MIB, "vae": 10 * MIB, "reward": 30 * MIB},
        trained=MIB,
    )
    block = {
        "keep": Numbers(40 * MIB, 50 * MIB, 50 * MIB, 3.0, 4.0, 2 * MIB),
        "feed-forward": Numbers(25 * MIB, 50 * MIB, 50 * MIB, 3.0, 5.0, 2 * MIB),
        "parts": Numbers(4 * MIB, 30 * MIB, 30 * MIB, 3.0, 6.5, 2 * MIB),
        "block": Numbers(0, 30 * MIB, 52 * MIB, 3.0, 7.0, 2 * MIB),
    }
    decoder = {"keep": Numbers(20 * MIB, 30 * MIB, 30 * MIB, 5.0, 5.0, 8 * MIB)}
    found.numbers = {"block": block, "decoder": decoder}
    for step in range(min(k, 2)):
        for number in range(2):
            name = NAMES[TRANSFORMER_BLOCK].format(number)
            parts = PARTS[TRANSFORMER_BLOCK]
            found.units.append(Unit(name, TRANSFORMER_BLOCK, step, "block", parts))
    found.units.append(Unit("vae.decoder.mid_block", DECODER_BLOCK, 0, "decoder", frozenset()))
    base, last = 140 * MIB, len(found.units) - 1
    found.intervals.append(Interval("prefix", BEFORE, -1, False, 0, base, 0))
    for index in range(last):
        step = found.units[index].step
        found.intervals.append(Interval("suffix", step, index, False, index, base, 0))
    found.step_starts = found.step_ends = [base] * min(k, 2)
    found.intervals.append(Interval("decode", BEHIND, last, False, last, base, 0))
    found.intervals.append(Interval("decode_backward", BEHIND, last, True, last, base, 0))
    for index in reversed(range(last)):
        step = found.units[index].step
        found.intervals.append(Interval("backward", step, index, True, index, base, 0))
    return found


def test_without_a_limit_everything_is_kept() -> None:
    planned = make_plan(simple(3), 3, 47, Limits(None))
    assert not any(planned.plan.steps)
    assert not planned.plan.decode
    assert not planned.plan.reward
    assert planned.peak == (140 + 6 * 40 + 30) * MIB
    assert planned.seconds == planned.unlimited_seconds == 47 * 10 + 3 * 22 + 5


def test_more_budget_is_never_slower() -> None:
    profile = simple(5)
    seconds = [
        make_plan(profile, 5, 45, Limits(budget * MIB), gap=0.0).seconds
        for budget in (190, 200, 220, 260, 300, 380, 500, 600)
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_a_peak_is_that_of_every_step_also_where_steps_share_their_choices(k: int) -> None:
    profile = simple(k)
    # gradients are there in all steps but the first that runs backward; each whole step keeps more
    profile.trained, profile.step_input = 30 * MIB, 4 * MIB
    for problem in Planner(profile, k, 40, Limits(None))._every_problem():
        for mode in ("keep", "block"):
            chosen = {modes.get(mode, modes["keep"]) for modes in problem.choice.values()}
            planned = problem._planned(chosen, 0.0, None)
            highest: dict[str, int] = {}
            for phase, nbytes, _ in planned.timeline():
                highest[phase] = max(nbytes, highest.get(phase, 0))
            assert planned.by_phase == highest, (problem.whole, mode)


def test_rules_say_what_was_chosen() -> None:
    profile = simple(1)
    plan = make_plan(profile, 1, 49, Limits(222 * MIB), gap=0.0).plan
    kept = 0
    for unit in profile.units[:-1]:
        found = {
            part: policy_for(plan.steps[0], f"{unit.name}.{name}", part)
            for part, name in (("feed-forward", "feed_forward"), ("attention", "self_attention"))
        }
        block = policy_for(plan.steps[0], unit.name, unit.kind)
        if block is Policy.RECOMPUTE:
            continue
        if found["attention"] is Policy.RECOMPUTE:
            kept += 4
        else:
            kept += 25 if found["feed-forward"] is Policy.RECOMPUTE else 40
    assert 140 + kept + 30 <= 222
    # nothing is dearer than it must be: the next cheaper choice of either block does not fit
    assert kept + 15 > 222 - 170


def test_offloading_takes_inputs_away_and_counts_what_it_moves() -> None:
    profile = simple(5)
    small = Numbers(0, 8 * MIB, 8 * MIB, 3.0, 7.0, 2 * MIB)
    profile.numbers["block"] |= {"block": small}
    kept = least_peak(profile, 5, Limits(None))
    away = least_peak(profile, 5, Limits(None, offload=True))
    assert away < kept
    # at 1 MiB a second the arithmetic hides 50 seconds of it
    for rate, stall in ((1000 * MIB, 0.0), (MIB / 4, 30.0)):
        limits = Limits(away, to_host=rate, to_device=rate, offload=True)
        planned = make_plan(profile, 5, 45, limits, gap=0.0)
        assert planned.plan.offloads
        assert planned.offloaded == 20 * MIB
        recomputed = planned.unlimited_seconds + 10 * (7.0 - 4.0)
        assert planned.seconds == pytest.approx(recomputed + stall)


def test_phases_take_weights_away_where_they_are_not_needed() -> None:
    profile = simple(1)
    everywhere = least_peak(profile, 1, Limits(None))
    by_phase = least_peak(profile, 1, Limits(None, residencies=("all", "phases")))
    assert everywhere - by_phase >= 30 * MIB
    planned = make_plan(
        profile, 1, 49, Limits(by_phase + MIB, residencies=("all", "phases"), to_device=100 * MIB)
    )
    assert planned.plan.residency == "phases"
    # one upload of all weights
    assert planned.seconds >= planned.unlimited_seconds + 1.4


def test_what_does_not_fit_says_what_would_help() -> None:
    with pytest.raises(BudgetError, match="residency by phases, offloading, a smaller K"):
        make_plan(simple(2), 2, 48, Limits(100 * MIB))
